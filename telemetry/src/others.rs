//! Metrics of other processes, which are shown with one's own.
//!
//! A scraper does not know processes that come and go on free ports, such as the invokers of an autoscaler or an agent.
//! Whoever has started them shows theirs among his own, each sample with a label that says whose it is.

use std::{
    collections::{BTreeMap, HashMap},
    net::SocketAddr,
    sync::{Arc, Mutex, PoisonError},
    time::Duration,
};

use crate::http::get;

/// Longest wait for all of them. A scraper waits ten seconds by default.
const PATIENCE: Duration = Duration::from_secs(2);

/// The admin ports of other processes, by name. Clones share it.
#[derive(Clone, Debug)]
pub struct Others {
    label: &'static str,
    addresses: Arc<Mutex<BTreeMap<String, SocketAddr>>>,
}

impl Others {
    /// Nobody so far. `label` is that of the name in the samples.
    #[must_use]
    pub fn new(label: &'static str) -> Self {
        Self { label, addresses: Arc::default() }
    }

    /// Shows the metrics of a process from now on, or no more.
    pub fn set(&self, name: &str, address: Option<SocketAddr>) {
        let mut addresses = self.addresses.lock().unwrap_or_else(PoisonError::into_inner);
        match address {
            Some(address) => addresses.insert(name.to_owned(), address),
            None => addresses.remove(name),
        };
    }

    /// `own` with the metrics of all others. One that does not answer in time is left out: its series have a gap.
    pub(crate) async fn with(&self, own: String) -> String {
        let addresses = self.addresses.lock().unwrap_or_else(PoisonError::into_inner).clone();
        let asked: Vec<_> = (addresses.into_iter())
            .map(|(name, address)| (name, tokio::spawn(get(address, "/metrics", PATIENCE))))
            .collect();
        if asked.is_empty() {
            return own;
        }
        let mut merged = Merged::default();
        merged.add(&own, None);
        for (name, answer) in asked {
            match answer.await {
                Ok(Ok((200, text))) => merged.add(&text, Some(&format!("{}=\"{name}\"", self.label))),
                failed => tracing::debug!(name, ?failed, "no metrics of another process"),
            }
        }
        merged.text()
    }
}

/// Texts in the Prometheus format put together: the format wants all samples of a family in one place.
#[derive(Debug, Default)]
struct Merged {
    families: Vec<Family>,
    places: HashMap<String, usize>,
}

#[derive(Debug, Default)]
struct Family {
    head: String,
    samples: String,
}

impl Merged {
    /// Adds a text as the exporter makes it: in each family `HELP`, if any, and `TYPE`, then the samples.
    fn add(&mut self, text: &str, label: Option<&str>) {
        let (mut place, mut known) = (None, false);
        for line in text.lines().filter(|line| !line.is_empty()) {
            if let Some(comment) = line.strip_prefix("# ") {
                let name = comment.split(' ').nth(1).unwrap_or_default();
                let current = place.filter(|place: &usize| self.places.get(name) == Some(place));
                if current.is_none() {
                    known = self.places.contains_key(name);
                    let next = self.families.len();
                    let at = *self.places.entry(name.to_owned()).or_insert(next);
                    if at == next {
                        self.families.push(Family::default());
                    }
                    place = Some(at);
                }
                if let Some(place) = place.filter(|_| !known) {
                    self.families[place].head += &format!("{line}\n");
                }
            } else if let Some(place) = place {
                self.families[place].samples += &labelled(line, label);
            }
        }
    }

    fn text(self) -> String {
        self.families.into_iter().map(|family| family.head + &family.samples).collect::<Vec<_>>().join("\n")
    }
}

/// A sample with one label more.
fn labelled(line: &str, label: Option<&str>) -> String {
    let Some(label) = label else { return format!("{line}\n") };
    // No name has a brace or a space in it.
    let Some(end) = line.find(['{', ' ']) else { return String::new() };
    let (name, rest) = line.split_at(end);
    match rest.strip_prefix('{') {
        Some(labels) => format!("{name}{{{label},{labels}\n"),
        None => format!("{name}{{{label}}}{rest}\n"),
    }
}

#[cfg(test)]
mod tests {
    use tokio::{
        io::{AsyncReadExt as _, AsyncWriteExt as _},
        net::TcpListener,
    };

    use super::*;

    #[test]
    fn families_stay_together() {
        let mut merged = Merged::default();
        merged.add(
            "# HELP a_total A.\n# TYPE a_total counter\na_total 1\n\n# TYPE b gauge\nb{x=\"{1 }\"} 2\n",
            None,
        );
        merged.add(
            "# TYPE b gauge\nb{x=\"{1 }\"} 3\nb 4\n\n# HELP a_total A.\n# TYPE a_total counter\na_total 5\n\n# TYPE c gauge\nc 6\n",
            Some("who=\"me\""),
        );
        let expected = "# HELP a_total A.\n# TYPE a_total counter\na_total 1\na_total{who=\"me\"} 5\n\n\
                        # TYPE b gauge\nb{x=\"{1 }\"} 2\nb{who=\"me\",x=\"{1 }\"} 3\nb{who=\"me\"} 4\n\n\
                        # TYPE c gauge\nc{who=\"me\"} 6\n";
        assert_eq!(merged.text(), expected);
    }

    #[tokio::test]
    async fn who_does_not_answer_is_left_out() {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let server = tokio::spawn(async move {
            for body in ["HTTP/1.0 200 OK\r\n\r\n# TYPE a gauge\na 1\n", "HTTP/1.0 500 Oh\r\n\r\n"] {
                let (mut stream, _) = listener.accept().await.unwrap();
                let mut request = [0; 256];
                let length = stream.read(&mut request).await.unwrap();
                assert!(request[..length].starts_with(b"GET /metrics HTTP/1.0\r\n"));
                stream.write_all(body.as_bytes()).await.unwrap();
            }
        });
        let others = Others::new("invoker");
        let own = "# TYPE a gauge\na 0\n";
        assert_eq!(others.with(own.to_owned()).await, own);
        others.set("one", Some(address));
        assert_eq!(others.with(own.to_owned()).await, "# TYPE a gauge\na 0\na{invoker=\"one\"} 1\n");
        assert_eq!(others.with(own.to_owned()).await, own, "it answered something else");
        server.await.unwrap();
        assert_eq!(others.with(own.to_owned()).await, own, "it is gone");
        others.set("one", None);
        assert_eq!(others.with(own.to_owned()).await, own);
    }
}
