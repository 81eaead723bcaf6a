//! What an autoscaler knows of agents and of the invokers on them: beats, answers and the time go in; who ended,
//! and who is to be told to stop, comes out.

use std::{
    collections::{BTreeMap, BTreeSet, VecDeque},
    time::{Duration, Instant},
};

use thalweg_protocol::{AgentBeat, Incarnation};

/// A stop that shows no effect is sent again after this.
const STOP_AGAIN: Duration = Duration::from_secs(1);
/// Given up invokers that are remembered, in case they turn up again.
const REMEMBERED: usize = 1024;

#[derive(Debug)]
struct Agent {
    name: String,
    slots: u32,
    heard: Instant,
    changes: u64,
    invokers: BTreeSet<String>,
    /// It has just refused a start, or did not answer: others come first until it beats again.
    passed_over: bool,
}

#[derive(Debug)]
struct Hosted {
    agent: Incarnation,
    /// Beats of the agent with fewer changes are older than its start.
    since: u64,
    stopping: bool,
}

/// Agents by their lives, and the invokers on them that are in our charge.
#[derive(Debug)]
pub(super) struct Hosts {
    dead_after: Duration,
    agents: BTreeMap<Incarnation, Agent>,
    invokers: BTreeMap<String, Hosted>,
    /// Given up while they may still run: told to stop wherever they turn up.
    given_up: VecDeque<String>,
    told: BTreeMap<String, Instant>,
}

/// What [`Hosts::sweep`] found out.
#[derive(Debug, Default, PartialEq, Eq)]
pub(super) struct Swept {
    /// Invokers that have ended; each is named once.
    pub(super) ended: Vec<String>,
    /// Whom to tell to stop, and where.
    pub(super) stop: Vec<(Incarnation, String)>,
}

impl Hosts {
    /// Nobody is known. Agents are taken for dead after a silence of `dead_after`.
    pub(super) fn new(dead_after: Duration) -> Self {
        Self {
            dead_after,
            agents: BTreeMap::new(),
            invokers: BTreeMap::new(),
            given_up: VecDeque::new(),
            told: BTreeMap::new(),
        }
    }

    /// An agent has beaten.
    pub(super) fn beat(&mut self, beat: AgentBeat, now: Instant) {
        let invokers = beat.invokers.iter().map(ToString::to_string).collect();
        let known = self.agents.contains_key(&beat.life);
        if !known {
            tracing::info!(agent = beat.agent, life = %beat.life, slots = beat.slots, "found an agent");
        }
        let AgentBeat { agent: name, life, slots, changes, .. } = beat;
        self.agents.insert(life, Agent { name, slots, heard: now, changes, invokers, passed_over: false });
    }

    /// Nothing could be heard up to now: nobody's silence means anything.
    pub(super) fn interrupted(&mut self, now: Instant) {
        self.agents.values_mut().for_each(|agent| agent.heard = now);
    }

    /// Number of agents that are known.
    pub(super) fn count(&self) -> usize {
        self.agents.len()
    }

    /// An agent's name.
    pub(super) fn name(&self, life: Incarnation) -> &str {
        self.agents.get(&life).map_or("", |agent| &agent.name)
    }

    fn used(&self, life: Incarnation, agent: &Agent) -> usize {
        let unlisted =
            |(id, hosted): &(&String, &Hosted)| hosted.agent == life && !agent.invokers.contains(*id);
        agent.invokers.len() + self.invokers.iter().filter(unlisted).count()
    }

    /// The agent with the most room for another invoker, if any has some.
    pub(super) fn choose(&self) -> Option<Incarnation> {
        let free = |(life, agent): (&Incarnation, &Agent)| {
            let free = (agent.slots as usize).saturating_sub(self.used(*life, agent));
            (free > 0 && !agent.passed_over).then_some((free, *life))
        };
        self.agents.iter().filter_map(free).max().map(|(_, life)| life)
    }

    /// An agent has started an invoker, by its count of changes.
    pub(super) fn started(&mut self, id: &str, agent: Incarnation, changes: u64) {
        self.invokers.insert(id.to_owned(), Hosted { agent, since: changes, stopping: false });
    }

    /// An agent has not started an invoker: others come first until it beats again.
    pub(super) fn pass_over(&mut self, life: Incarnation) {
        if let Some(agent) = self.agents.get_mut(&life) {
            agent.passed_over = true;
        }
    }

    /// Whether an invoker was started is unknown, or it may still run though it counts as ended: if it turns up,
    /// it is stopped.
    pub(super) fn give_up(&mut self, id: &str) {
        if self.given_up.len() == REMEMBERED {
            self.given_up.pop_front();
        }
        self.given_up.push_back(id.to_owned());
    }

    /// An invoker is to be stopped.
    pub(super) fn stop(&mut self, id: &str) {
        if let Some(hosted) = self.invokers.get_mut(id) {
            hosted.stopping = true;
        }
    }

    /// All invokers are to be stopped.
    pub(super) fn stop_all(&mut self) {
        self.invokers.values_mut().for_each(|hosted| hosted.stopping = true);
    }

    /// Whether no invoker is in our charge.
    pub(super) fn is_empty(&self) -> bool {
        self.invokers.is_empty()
    }

    /// Takes charge of the invokers on all agents that are in nobody's: names them.
    pub(super) fn adopt(&mut self) -> Vec<String> {
        let mut adopted = Vec::new();
        for (life, agent) in &self.agents {
            for id in &agent.invokers {
                if !self.invokers.contains_key(id) && !self.given_up.contains(id) {
                    let hosted = Hosted { agent: *life, since: agent.changes, stopping: false };
                    self.invokers.insert(id.clone(), hosted);
                    adopted.push(id.clone());
                }
            }
        }
        adopted
    }

    /// Finds out who has ended, and who has to be told to stop now.
    pub(super) fn sweep(&mut self, now: Instant) -> Swept {
        let mut swept = Swept::default();
        let dead_after = self.dead_after;
        self.agents.retain(|life, agent| {
            let alive = now.saturating_duration_since(agent.heard) < dead_after;
            if !alive && agent.slots > 0 {
                tracing::warn!(agent = agent.name, %life, "an agent is silent; giving it up with its invokers");
            }
            alive
        });
        self.invokers.retain(|id, hosted| {
            let runs = match self.agents.get(&hosted.agent) {
                None => false,
                Some(agent) => agent.changes < hosted.since || agent.invokers.contains(id),
            };
            if !runs {
                swept.ended.push(id.clone());
            }
            runs
        });
        for id in &swept.ended {
            self.give_up(id);
        }
        // Of those in our charge also the ones that no beat has listed yet.
        let ours = self.invokers.iter().filter(|(_, hosted)| hosted.stopping);
        let mut stop: BTreeSet<_> = ours.map(|(id, hosted)| (hosted.agent, id.clone())).collect();
        for (life, agent) in &self.agents {
            let unwanted = agent.invokers.iter().filter(|id| self.given_up.contains(*id));
            stop.extend(unwanted.map(|id| (*life, id.clone())));
        }
        self.told.retain(|id, _| stop.iter().any(|(_, listed)| listed == id));
        for (life, id) in stop {
            let due =
                self.told.get(&id).is_none_or(|told| now.saturating_duration_since(*told) >= STOP_AGAIN);
            if due {
                self.told.insert(id.clone(), now);
                swept.stop.push((life, id));
            }
        }
        swept
    }
}

#[cfg(test)]
#[path = "hosts_tests.rs"]
mod tests;
