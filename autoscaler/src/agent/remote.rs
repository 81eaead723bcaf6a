//! The autoscaler's side of agents.

use std::time::{Duration, Instant};

use async_trait::async_trait;
use bytes::Bytes;
use futures::{FutureExt as _, StreamExt as _};
use thalweg_broker::{Connection, RequestError, Said, request};
use thalweg_protocol::{AgentBeat, AgentReply, AgentRequest, Kind, Name, frame, subjects};
use tokio::sync::watch;

use super::hosts::Hosts;
use crate::{Actuator, ActuatorError, StartError};

/// Time that an agent has to answer.
const ANSWER: Duration = Duration::from_secs(2);
/// A pause between two looks at the beats after which they may be incomplete, and silence means nothing.
const GAP: Duration = Duration::from_secs(1);
/// Time between looks at invokers that are being waited for.
const POLL: Duration = Duration::from_millis(20);
/// Beyond the drain timeout, for what is under way.
const GRACE: Duration = Duration::from_secs(2);

/// Invokers on the hosts of agents, which are found by their heartbeats. Each is started by the agent that has the
/// most free slots.
///
/// Agents that are silent for the given time are taken for dead, and their invokers for ended; silence while this
/// side could not listen does not count. Should one come back, its former invokers are stopped.
#[derive(Debug)]
pub struct AgentActuator {
    connection: Connection,
    connects: watch::Receiver<u64>,
    beats: async_nats::Subscriber,
    drain_timeout: Duration,
    hosts: Hosts,
    /// Ended, and not reaped yet.
    ended: Vec<String>,
    looked: Instant,
    said: Said,
}

impl AgentActuator {
    /// Listens for agents. They are taken for dead after a silence of `dead_after`; at the end their invokers are
    /// waited for no longer than `drain_timeout` and a little.
    ///
    /// # Errors
    /// When the connection is closed.
    pub async fn open(
        connection: Connection,
        dead_after: Duration,
        drain_timeout: Duration,
    ) -> Result<Self, async_nats::SubscribeError> {
        let beats = connection.client.subscribe(subjects::AGENT_BEATS).await?;
        let mut connects = connection.connects();
        connects.mark_unchanged();
        let (hosts, looked) = (Hosts::new(dead_after), Instant::now());
        Ok(Self {
            connection,
            connects,
            beats,
            drain_timeout,
            hosts,
            ended: Vec::new(),
            looked,
            said: Said::new(),
        })
    }

    /// Number of agents that were heard lately, as of the last call of [`Actuator::reap`].
    #[must_use]
    pub fn agents(&self) -> usize {
        self.hosts.count()
    }

    /// Takes in the beats that have come.
    fn look(&mut self) {
        let now = Instant::now();
        let connected = self.connection.client.connection_state() == async_nats::connection::State::Connected;
        let reconnected = self.connects.has_changed().unwrap_or(true);
        self.connects.mark_unchanged();
        if !connected || reconnected || now - self.looked > GAP {
            self.hosts.interrupted(now);
        }
        self.looked = now;
        while let Some(Some(message)) = self.beats.next().now_or_never() {
            match frame::open::<AgentBeat>(Kind::AgentBeat, &message.payload) {
                Ok((beat, _)) => self.hosts.beat(beat, now),
                Err(error) => {
                    let agent = message.subject.as_str();
                    if self.said.is_new(&format!("{agent}: {error}")) {
                        tracing::warn!(agent, %error, "an agent whose heartbeats are not understood is left alone");
                    }
                }
            }
        }
    }

    /// Finds out who has ended, and sends the stops that are due.
    async fn sweep(&mut self) {
        self.look();
        let swept = self.hosts.sweep(Instant::now());
        for (life, id) in swept.stop {
            let Ok(invoker) = Name::new(id) else { continue };
            let frame = frame::seal(Kind::AgentRequest, &AgentRequest::Stop { invoker }, &[]);
            // One that is lost is sent again.
            let _ = self.connection.client.publish(subjects::agent(life), frame).await;
        }
        self.ended.extend(swept.ended);
    }
}

#[async_trait]
impl Actuator for AgentActuator {
    async fn start(&mut self, id: &str) -> Result<(), ActuatorError> {
        let failed = |source| ActuatorError::new(id, source);
        let invoker = Name::new(id).map_err(|error| failed(StartError::Id(error)))?;
        self.look();
        let ask = AgentRequest::Start { invoker };
        let mut refused = None;
        while let Some(life) = self.hosts.choose() {
            let agent = self.hosts.name(life).to_owned();
            let kinds = (Kind::AgentRequest, Kind::AgentReply);
            let answer: Result<(AgentReply, Bytes), _> =
                request(&self.connection.client, &subjects::agent(life), kinds, &ask, &[], ANSWER).await;
            match answer {
                Ok((AgentReply::Done { changes }, _)) => {
                    tracing::info!(invoker = id, agent, "started invoker through an agent");
                    self.hosts.started(id, life, changes);
                    return Ok(());
                }
                Ok((AgentReply::Error(error), _)) => refused = Some(StartError::Agent { agent, error }),
                // It has not heard this, so somebody else can be asked.
                Err(error @ RequestError::NoResponders(_)) => {
                    refused = Some(StartError::Unanswered { agent, error: error.to_string() });
                }
                Err(error) => {
                    self.hosts.give_up(id);
                    self.hosts.pass_over(life);
                    return Err(failed(StartError::Unanswered { agent, error: error.to_string() }));
                }
            }
            self.hosts.pass_over(life);
        }
        Err(failed(refused.unwrap_or(StartError::NoRoom { agents: self.hosts.count() })))
    }

    async fn stop(&mut self, id: &str) {
        self.hosts.stop(id);
        // Told by the next sweep, which also repeats it; the sooner the better.
        self.sweep().await;
    }

    async fn reap(&mut self) -> Vec<String> {
        self.sweep().await;
        std::mem::take(&mut self.ended)
    }

    async fn adopt(&mut self) -> Vec<String> {
        self.look();
        self.hosts.adopt()
    }

    async fn stop_all(&mut self) {
        self.hosts.stop_all();
        let deadline = Instant::now() + self.drain_timeout + GRACE;
        loop {
            self.sweep().await;
            if self.hosts.is_empty() {
                return;
            }
            if Instant::now() >= deadline {
                tracing::warn!("invokers on other hosts did not end in time; leaving them to their agents");
                return;
            }
            tokio::time::sleep(POLL).await;
        }
    }
}
