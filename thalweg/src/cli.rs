//! Arguments.

use std::path::PathBuf;

use anyhow::Context as _;
use clap::{Args, CommandFactory as _, Parser, Subcommand};
use thalweg_telemetry::config::{Loader, dump, parse_override};

use crate::{admin, bench, config::Config, demo, doctor, health, services, simulate, up};

/// Elastic, exactly-once aggregation of gradients.
///
/// Start with `thalweg demo`: it runs everything on this machine and trains a small model with four
/// worker processes. `thalweg up` is the same service for your own training loops. On several machines,
/// run `gateway`, `store`, `autoscaler` and `invoker` against one NATS server, in any order.
#[derive(Debug, Parser)]
#[command(version = env!("THALWEG_VERSION"), propagate_version = true, after_help = admin::EXIT_CODES)]
pub struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Everything on this machine: nats-server, gateway, store, autoscaler and invokers
    Up(UpArgs),
    /// Jobs, rosters and windows, for the SDK over NATS and for people over HTTP
    Gateway(Common),
    /// Shard state on this machine's disk
    Store(StoreArgs),
    /// One function host; usually started by the autoscaler
    Invoker(InvokerArgs),
    /// Starts and stops invokers by queue depth, and places partitions on them
    Autoscaler(Common),
    /// Runs invokers on this host for an autoscaler elsewhere (autoscaler.actuator = "agent")
    Agent(AgentArgs),
    /// Create, show, pause, change, snapshot, restore and remove jobs
    #[command(subcommand)]
    Job(admin::JobCommand),
    /// What runs, who waits for what, and how far the jobs are
    Status(admin::Target),
    /// Messages that nobody could process
    #[command(subcommand)]
    Deadletter(admin::DeadLetterCommand),
    Events(admin::EventsArgs),
    Record(admin::RecordArgs),
    Trace(admin::TraceArgs),
    /// Examines the configuration, this host and the deployment; each finding comes with its remedy
    #[command(after_help = DOCTOR)]
    Doctor(DoctorArgs),
    /// Whether a process of this host is ready, and what it waits for; for health checks of containers
    Health(health::Args),
    /// Completions for a shell, on standard output
    #[command(after_help = COMPLETIONS)]
    Completions {
        /// The shell
        shell: clap_complete::Shell,
    },
    /// Man pages of all commands, into a directory
    #[command(after_help = MAN)]
    Man {
        /// The directory; created if it is not there
        directory: PathBuf,
    },
    /// Trains a model on handwritten digits with worker processes, through an embedded service or any other
    Demo(demo::Args),
    /// Measures all-reduce and the store, with results checked
    Bench(bench::Args),
    /// What a trace of jobs would cost under one policy or another
    Simulate(simulate::Args),
    #[command(hide = true)]
    DemoWorker(demo::WorkerArgs),
    #[command(hide = true)]
    BenchWorker(bench::WorkerArgs),
    #[command(hide = true)]
    BenchFolder(bench::FolderArgs),
}

const COMPLETIONS: &str = "\
Examples:
  thalweg completions bash > ~/.local/share/bash-completion/completions/thalweg
  thalweg completions zsh > \"${fpath[1]}/_thalweg\"
  thalweg completions fish > ~/.config/fish/completions/thalweg.fish
";
const DOCTOR: &str = "\
Examines what a component would see with the same flags, file and environment: settings that clash, the data directory and
its disk, limits of this host, the NATS server (version, JetStream, payload, memory, permissions, clock), and what runs
against it. Changes nothing. Exits with 1 where something does not work.

Examples:
  thalweg doctor
  thalweg doctor --config /etc/thalweg/thalweg.toml --json
";
const MAN: &str = "\
Example:
  thalweg man ~/.local/share/man/man1 && man thalweg-job-snapshot
";

/// Flags of every service.
#[derive(Debug, Args)]
pub struct Common {
    /// TOML file; see docs/thalweg.toml for every key with its default
    #[arg(long, short, env = "THALWEG_CONFIG")]
    config: Option<PathBuf>,
    /// NATS server, such as nats://127.0.0.1:4222
    #[arg(long, env = "THALWEG_URL")]
    nats_url: Option<String>,
    /// Address of /livez, /readyz, /metrics and /log; port 0 takes a free one
    #[arg(long)]
    admin: Option<String>,
    /// Any key of the configuration, for example --set autoscaler.policy.max_invokers=8
    #[arg(long = "set", value_name = "KEY=VALUE", value_parser = parse_override)]
    overrides: Vec<(String, String)>,
    /// Print the configuration that would be used, as TOML, and stop
    #[arg(long)]
    dump_config: bool,
}

#[derive(Debug, Args)]
struct UpArgs {
    #[command(flatten)]
    common: Common,
    /// Stop when standard input ends: with the program that started this, however that ends
    #[arg(long)]
    with_stdin: bool,
}

#[derive(Debug, Args)]
struct StoreArgs {
    #[command(flatten)]
    common: Common,
    /// Data directory
    #[arg(long)]
    data_dir: Option<PathBuf>,
    /// Give up the jobs of the data directory that is registered, and register this one instead
    #[arg(long)]
    replace: bool,
}

#[derive(Debug, Args)]
struct InvokerArgs {
    #[command(flatten)]
    common: Common,
    /// Id; two invokers must not share one
    #[arg(long)]
    id: Option<String>,
    /// Drain and stop when standard input ends: with the program that started this, however that ends
    #[arg(long)]
    with_stdin: bool,
    /// Print the address of the admin port on standard output, for whoever has chosen port 0
    #[arg(long)]
    announce: bool,
}

#[derive(Debug, Args)]
struct DoctorArgs {
    #[command(flatten)]
    common: Common,
    /// Longest wait for an answer, such as 30s or 500ms
    #[arg(long, value_name = "DURATION", default_value = "5s", value_parser = admin::parse_wait)]
    timeout: std::time::Duration,
    /// Print JSON for programs instead of text for people
    #[arg(long)]
    json: bool,
}

#[derive(Debug, Args)]
struct AgentArgs {
    #[command(flatten)]
    common: Common,
    /// Its name in logs [default: the host's]
    #[arg(long)]
    name: Option<String>,
    /// Most invokers at once
    #[arg(long)]
    max_invokers: Option<u32>,
}

impl Common {
    /// Where the configuration is to be read, flags included.
    fn loader(&self, more: &[(&str, Option<String>)]) -> Loader {
        let flags = [("nats.url", self.nats_url.clone()), ("admin.listen", self.admin.clone())];
        let flags = flags.into_iter().chain(more.iter().cloned());
        let flags = flags.filter_map(|(key, value)| Some((key.to_owned(), value?)));
        let overrides = self.overrides.iter().cloned().chain(flags).collect();
        Loader::new("THALWEG").file(self.config.clone()).overrides(overrides)
    }

    /// The configuration in force and where to read it again, or `None` when it was only to be printed.
    fn load(&self, more: &[(&str, Option<String>)]) -> anyhow::Result<Option<(Config, Loader)>> {
        let loader = self.loader(more);
        let config = Config::load(&loader)?;
        if self.dump_config {
            use std::io::Write as _;
            std::io::stdout().write_all(dump(&config)?.as_bytes())?;
            return Ok(None);
        }
        thalweg_telemetry::logs::init(&config.log.filter, config.log.format)?;
        Ok(Some((config, loader)))
    }
}

impl Cli {
    /// Reads the arguments; ends the process where they are wrong, or ask for help.
    #[must_use]
    pub fn read() -> Self {
        let error = match Self::try_parse() {
            Ok(cli) => return cli,
            Err(error) => error,
        };
        // Nobody knows yet which command it is, so its word alone counts.
        if error.use_stderr() && std::env::args_os().any(|arg| arg == "--json") {
            let text = error.render().to_string();
            let message = text.strip_prefix("error: ").unwrap_or(&text).trim();
            eprintln!("{}", serde_json::json!({ "error": { "code": "usage", "message": message } }));
            std::process::exit(error.exit_code());
        }
        error.exit()
    }

    /// Whether errors are wanted as JSON.
    #[must_use]
    pub fn json(&self) -> bool {
        match &self.command {
            Command::Job(command) => command.target().json,
            Command::Status(target) => target.json,
            Command::Deadletter(command) => command.target().json,
            Command::Events(args) => args.target().json,
            Command::Record(args) => args.target().json,
            Command::Trace(args) => args.target().json,
            Command::Doctor(args) => args.json,
            _ => false,
        }
    }

    /// Does what was asked.
    ///
    /// # Errors
    /// With the whole story, for people.
    pub fn run(self) -> anyhow::Result<()> {
        match self.command {
            Command::Up(UpArgs { common, with_stdin }) => {
                anyhow::ensure!(
                    common.nats_url.is_none(),
                    "`thalweg up` runs a NATS server of its own, so --nats-url (or THALWEG_URL) has no effect here: \
                     leave it out, or run gateway, store and autoscaler against that server; the port of the embedded \
                     one is embedded.port"
                );
                let Some((config, loader)) = common.load(&[])? else { return Ok(()) };
                runtime()?.block_on(up::main(config, loader, with_stdin))
            }
            Command::Gateway(common) => {
                let Some((config, loader)) = common.load(&[])? else { return Ok(()) };
                runtime()?.block_on(services::gateway(config, loader))
            }
            Command::Store(args) => {
                let data_dir = args.data_dir.map(|path| path.display().to_string());
                let replace = args.replace.then(|| "true".to_owned());
                let more = [("store.data_dir", data_dir), ("store.replace", replace)];
                let Some((config, loader)) = args.common.load(&more)? else { return Ok(()) };
                runtime()?.block_on(services::store(config, loader))
            }
            Command::Invoker(args) => {
                let id = [("invoker.id", args.id)];
                let Some((config, loader)) = args.common.load(&id)? else { return Ok(()) };
                // One invoker is one thread: its CPU quota is measured on it.
                let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
                runtime.block_on(services::invoker(config, loader, (args.with_stdin, args.announce)))
            }
            Command::Autoscaler(common) => {
                let Some((config, loader)) = common.load(&[])? else { return Ok(()) };
                runtime()?.block_on(services::autoscaler(config, loader))
            }
            Command::Agent(args) => {
                let most = args.max_invokers.map(|most| most.to_string());
                let more = [("agent.name", args.name), ("agent.max_invokers", most)];
                let Some((config, loader)) = args.common.load(&more)? else { return Ok(()) };
                runtime()?.block_on(services::agent(config, loader))
            }
            Command::Job(command) => runtime()?.block_on(admin::job(command)),
            Command::Status(target) => runtime()?.block_on(admin::status(target)),
            Command::Deadletter(command) => runtime()?.block_on(admin::dead_letter(command)),
            Command::Events(args) => runtime()?.block_on(admin::events(args)),
            Command::Record(args) => runtime()?.block_on(admin::record(args)),
            Command::Trace(args) => runtime()?.block_on(admin::trace(args)),
            Command::Doctor(args) => {
                let config = Config::load(&args.common.loader(&[]));
                runtime()?.block_on(doctor::run(config, args.timeout, args.json))
            }
            Command::Health(args) => health::run(args),
            Command::Completions { shell } => {
                // Into memory first: it panics where it cannot write.
                let mut text = Vec::new();
                clap_complete::generate(shell, &mut Self::command(), "thalweg", &mut text);
                admin::print(&String::from_utf8_lossy(&text))
            }
            Command::Man { directory } => {
                std::fs::create_dir_all(&directory)
                    .and_then(|()| clap_mangen::generate_to(Self::command(), &directory))
                    .with_context(|| format!("man pages into {}", directory.display()))?;
                admin::print(&format!("man pages are in {}", directory.display()))
            }
            Command::Demo(args) => runtime()?.block_on(demo::run(args)),
            Command::Bench(args) => bench::run(args),
            Command::Simulate(args) => simulate::run(&args),
            Command::DemoWorker(args) => runtime()?.block_on(demo::worker(args)),
            Command::BenchWorker(args) => bench::worker(args),
            Command::BenchFolder(args) => bench::folder(args),
        }
    }
}

/// Says what went wrong; returns the exit code, as `thalweg --help` lists them.
#[must_use]
pub fn report(error: &anyhow::Error, json: bool) -> u8 {
    let kind = error.downcast_ref::<std::io::Error>().map(std::io::Error::kind);
    if kind == Some(std::io::ErrorKind::BrokenPipe) {
        // Whoever read standard output has seen enough.
        return 0;
    }
    if json {
        eprintln!("{}", admin::describe_error(error));
    } else {
        eprintln!("thalweg: {error:#}");
    }
    admin::exit_code(error)
}

pub(crate) fn runtime() -> anyhow::Result<tokio::runtime::Runtime> {
    tokio::runtime::Builder::new_multi_thread()
        .worker_threads(std::thread::available_parallelism().map_or(2, usize::from).clamp(2, 8))
        .enable_all()
        .build()
        .context("starting the runtime")
}
