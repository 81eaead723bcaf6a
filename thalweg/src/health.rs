//! `thalweg health`: asks a process of this host whether it is ready, for whoever has no HTTP client at hand.

use std::{
    net::{Ipv4Addr, Ipv6Addr, SocketAddr},
    path::PathBuf,
    time::Duration,
};

use anyhow::{Context as _, bail};
use serde_json::Value;
use thalweg_telemetry::{config::Loader, http};

use crate::{admin, cli, config::Config};

/// Arguments of `thalweg health`.
#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    /// TOML file of the process that is asked
    #[arg(long, short, env = "THALWEG_CONFIG")]
    config: Option<PathBuf>,
    /// Its admin port [default: admin.listen]
    #[arg(long)]
    admin: Option<String>,
    /// Longest wait for its answer, such as 2s or 500ms
    #[arg(long, value_name = "DURATION", default_value = "2s", value_parser = admin::parse_wait)]
    timeout: Duration,
}

/// Prints `ready`, or fails with what the process waits for.
///
/// # Errors
/// When it is not ready, or does not answer.
pub(crate) fn run(args: Args) -> anyhow::Result<()> {
    let admin = args.admin.map(|admin| ("admin.listen".to_owned(), admin));
    let loader = Loader::new("THALWEG").file(args.config).overrides(admin.into_iter().collect());
    let address = reachable(Config::load(&loader)?.admin.listen);
    let (status, body) = (cli::runtime()?)
        .block_on(http::get(address, "/readyz", args.timeout))
        .with_context(|| format!("nobody answers at {address}: the process does not run, or see --admin"))?;
    match status {
        200 => admin::print("ready"),
        503 => bail!("not ready: {}", obstacles(&body)),
        _ => bail!("{address} answered {status}: it is no admin port of Thalweg"),
    }
}

/// Where a process that listens on all addresses can be asked.
fn reachable(mut address: SocketAddr) -> SocketAddr {
    match address {
        SocketAddr::V4(v4) if v4.ip().is_unspecified() => address.set_ip(Ipv4Addr::LOCALHOST.into()),
        SocketAddr::V6(v6) if v6.ip().is_unspecified() => address.set_ip(Ipv6Addr::LOCALHOST.into()),
        _ => {}
    }
    address
}

/// What is not ready and why, for people.
fn obstacles(body: &str) -> String {
    let parsed = serde_json::from_str::<Value>(body).unwrap_or_default();
    let Some(components) = parsed["components"].as_object() else { return body.trim().to_owned() };
    let waiting = components.iter().filter(|(_, component)| component["ready"] != true);
    let waiting = waiting.map(|(name, component)| {
        format!("{name}: {}", component["reason"].as_str().unwrap_or("it does not say why"))
    });
    waiting.collect::<Vec<_>>().join("; ")
}

#[cfg(test)]
mod tests {
    use std::{
        io::{Read as _, Write as _},
        net::TcpListener,
    };

    use super::*;

    /// What becomes of an answer.
    fn outcome(answer: &'static str) -> Result<(), String> {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let admin = Some(listener.local_addr().unwrap().to_string());
        let server = std::thread::spawn(move || {
            let (mut stream, _) = listener.accept().unwrap();
            let mut request = [0; 1024];
            let length = stream.read(&mut request).unwrap();
            assert!(request[..length].starts_with(b"GET /readyz HTTP/1.0\r\n"));
            stream.write_all(answer.as_bytes()).unwrap();
        });
        let outcome = run(Args { config: None, admin, timeout: Duration::from_secs(5) });
        server.join().unwrap();
        outcome.map_err(|error| format!("{error:#}"))
    }

    #[test]
    fn it_is_ready_or_says_what_it_waits_for() {
        assert_eq!(outcome("HTTP/1.1 200 OK\r\n\r\n{\"ready\":true}"), Ok(()));
        let waiting = "HTTP/1.1 503 Service Unavailable\r\n\r\n{\"ready\":false,\"components\":{\
                       \"store\":{\"ready\":false,\"reason\":\"waiting for the registry\"},\
                       \"gateway\":{\"ready\":true,\"reason\":null}}}";
        assert_eq!(outcome(waiting), Err("not ready: store: waiting for the registry".to_owned()));
        assert!(outcome("HTTP/1.1 404 Not Found\r\n\r\n").unwrap_err().contains("answered 404"));
        assert!(outcome("+OK\r\n").unwrap_err().contains("not HTTP"));
    }

    #[test]
    fn a_process_that_listens_everywhere_is_asked_at_home() {
        for (listens, asked) in
            [("0.0.0.0:9600", "127.0.0.1:9600"), ("[::]:1", "[::1]:1"), ("10.1.2.3:9600", "10.1.2.3:9600")]
        {
            assert_eq!(reachable(listens.parse().unwrap()).to_string(), asked);
        }
    }
}
