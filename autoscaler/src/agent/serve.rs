//! The agent itself.

use std::{
    collections::{BTreeSet, VecDeque},
    time::{Duration, Instant},
};

use bytes::Bytes;
use futures::StreamExt as _;
use thalweg_broker::{Connection, Report};
use thalweg_protocol::{
    AgentBeat, AgentReply, AgentRequest, ErrorCode, Incarnation, Kind, Name, WireError, frame, subjects,
};
use tokio_util::sync::CancellationToken;

use super::AgentConfig;
use crate::Actuator;

/// Time between looks at the invokers.
const REAP: Duration = Duration::from_millis(50);
/// Beyond the drain timeout, for those that have to be killed.
const GRACE: Duration = Duration::from_secs(1);
/// Ended invokers that are remembered, so that a start that comes late or twice does not bring one back to life.
const REMEMBERED: usize = 1024;

/// Why an agent ended.
#[derive(Debug, thiserror::Error)]
pub enum AgentError {
    /// A setting is out of its range.
    #[error("agent configuration: {0}")]
    Config(String),
    /// The connection was closed for good.
    #[error("the connection to NATS was closed: {0}")]
    Closed(String),
}

/// Starts and stops invokers by `actuator` as autoscalers command, until `shutdown`; then stops all of them and
/// waits for it. `name` is what it is called in logs.
///
/// # Errors
/// [`AgentError`]; failures of NATS are waited out, and meanwhile all invokers are kept.
pub async fn serve_agent(
    config: AgentConfig,
    name: String,
    connection: Connection,
    actuator: Box<dyn Actuator>,
    report: Report,
    shutdown: CancellationToken,
) -> Result<(), AgentError> {
    config.validate().map_err(AgentError::Config)?;
    let beat_every = Duration::from_millis(config.beat_ms);
    let life = Incarnation::random();
    let client = connection.client.clone();
    let mut agent = Agent {
        name,
        life,
        slots: config.max_invokers,
        changes: 0,
        invokers: BTreeSet::new(),
        ended: VecDeque::new(),
        actuator,
    };
    let closed = |error: &dyn std::fmt::Display| AgentError::Closed(error.to_string());
    let mut requests = client.subscribe(subjects::agent(life)).await.map_err(|error| closed(&error))?;
    tracing::info!(agent = agent.name, %life, slots = agent.slots, "agent serves");
    report(None);
    let mut beats = tokio::time::interval(beat_every);
    let mut reap = tokio::time::interval(REAP);
    reap.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
    loop {
        let before = agent.changes;
        tokio::select! {
            () = shutdown.cancelled() => break,
            request = requests.next() => {
                let Some(request) = request else { return Err(closed(&"no more requests")) };
                let reply = frame::seal(Kind::AgentReply, &agent.answer(&request.payload).await, &[]);
                if let Some(to) = request.reply {
                    // Whoever gets no answer hears from the beats.
                    let _ = client.publish(to, reply).await;
                }
            }
            _ = reap.tick() => agent.reap().await,
            _ = beats.tick() => agent.beat(&client).await,
        }
        if agent.changes != before {
            agent.beat(&client).await;
        }
    }
    report(Some("stopping its invokers"));
    // Whoever still asks is told at once that nobody answers.
    let _ = requests.unsubscribe().await;
    agent.slots = 0;
    for id in agent.invokers.clone() {
        agent.actuator.stop(id.as_str()).await;
    }
    let until = Instant::now() + Duration::from_millis(config.drain_timeout_ms) + GRACE;
    while !agent.invokers.is_empty() && Instant::now() < until {
        let before = agent.changes;
        tokio::select! {
            _ = reap.tick() => agent.reap().await,
            _ = beats.tick() => agent.beat(&client).await,
        }
        if agent.changes != before {
            agent.beat(&client).await;
        }
    }
    agent.actuator.stop_all().await;
    agent.invokers.clear();
    agent.changes += 1;
    agent.beat(&client).await;
    // One last beat, without invokers: nobody has to wait for the silence. It may be lost.
    let _ = client.flush().await;
    Ok(())
}

struct Agent {
    name: String,
    life: Incarnation,
    slots: u32,
    changes: u64,
    invokers: BTreeSet<Name>,
    ended: VecDeque<Name>,
    actuator: Box<dyn Actuator>,
}

impl Agent {
    async fn answer(&mut self, payload: &Bytes) -> AgentReply {
        let request = match frame::open::<AgentRequest>(Kind::AgentRequest, payload) {
            Ok((request, _)) => request,
            Err(error) => return AgentReply::Error(error.to_wire()),
        };
        match request {
            AgentRequest::Start { invoker } => match self.start(invoker).await {
                Ok(()) => AgentReply::Done { changes: self.changes },
                Err(error) => AgentReply::Error(error),
            },
            AgentRequest::Stop { invoker } => {
                self.actuator.stop(invoker.as_str()).await;
                AgentReply::Done { changes: self.changes }
            }
        }
    }

    async fn start(&mut self, invoker: Name) -> Result<(), WireError> {
        if self.invokers.contains(&invoker) {
            return Ok(());
        }
        let refuse = |code, text: String| Err(WireError::new(code, text));
        if self.ended.contains(&invoker) {
            return refuse(ErrorCode::Gone, format!("invoker {invoker} has ended here: take another id"));
        }
        if self.slots == 0 {
            return refuse(ErrorCode::Unavailable, "this agent is about to end".to_owned());
        }
        if self.invokers.len() >= self.slots as usize {
            let text = format!("all {} slots are taken (agent.max_invokers)", self.slots);
            return refuse(ErrorCode::Limit, text);
        }
        if let Err(error) = self.actuator.start(invoker.as_str()).await {
            tracing::warn!(%error, "refusing a start");
            return refuse(ErrorCode::Internal, error.to_string());
        }
        self.invokers.insert(invoker);
        self.changes += 1;
        Ok(())
    }

    async fn reap(&mut self) {
        for id in self.actuator.reap().await {
            let Ok(id) = Name::new(id) else { continue };
            self.invokers.remove(&id);
            if self.ended.len() == REMEMBERED {
                self.ended.pop_front();
            }
            self.ended.push_back(id);
            self.changes += 1;
        }
    }

    async fn beat(&self, client: &async_nats::Client) {
        let beat = AgentBeat {
            agent: self.name.clone(),
            life: self.life,
            slots: self.slots,
            changes: self.changes,
            invokers: self.invokers.iter().cloned().collect(),
        };
        // A beat that is lost is followed by another one.
        let _ =
            client.publish(subjects::agent_beat(self.life), frame::seal(Kind::AgentBeat, &beat, &[])).await;
    }
}
