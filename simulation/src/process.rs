//! Processes: their lives, their connections to the broker, and what they wait for.

use std::{
    future::Future,
    pin::Pin,
    task::{Context, Poll, Waker},
};

use rand::RngExt as _;

use crate::{
    calls::{Answer, Ask, Remote},
    network::{Actor, Body, Millis},
    world::{Done, Event, World},
};

/// Time-out of a request.
pub(crate) const TIMEOUT_MS: Millis = 600;

type Task = Pin<Box<dyn Future<Output = Done>>>;

/// A process: its connection to the broker, and what it waits for.
pub(crate) struct Process {
    /// Tells it from those before it.
    pub(crate) life: u32,
    pub(crate) up: bool,
    /// Grows whenever the connection breaks.
    pub(crate) epoch: u32,
    /// What the client sends once it is connected again.
    pub(crate) outbox: Vec<(Actor, Body)>,
    pub(crate) remote: Remote,
    pub(crate) tasks: Vec<Task>,
    pub(crate) frozen_until: Millis,
    /// Its way to the broker is cut until then.
    pub(crate) cut_until: Millis,
    /// Dies after so many more messages.
    pub(crate) dies_after: Option<u32>,
}

impl World {
    pub(crate) fn life(&self, actor: Actor) -> u32 {
        self.processes.get(&actor).map_or(0, |process| process.life)
    }

    pub(crate) fn epoch(&self, actor: Actor) -> u32 {
        match actor {
            Actor::Broker => self.broker_life,
            actor => self.processes.get(&actor).map_or(0, |process| process.epoch),
        }
    }

    pub(crate) fn is_connected(&self, actor: Actor) -> bool {
        self.broker_up && self.processes.get(&actor).is_some_and(|process| process.up)
    }

    pub(crate) fn actors(&self) -> Vec<Actor> {
        self.processes.keys().copied().filter(|actor| *actor != Actor::Operator).collect()
    }

    pub(crate) fn is_frozen(&self, actor: Actor) -> bool {
        self.processes.get(&actor).is_some_and(|process| process.frozen_until > self.now)
    }

    /// A process begins.
    pub(crate) fn born(&mut self, actor: Actor) {
        self.lives += 1;
        let process = Process {
            life: self.lives,
            up: self.broker_up,
            epoch: self.lives,
            outbox: Vec::new(),
            remote: Remote::new(self.call_ids.clone()),
            tasks: Vec::new(),
            frozen_until: 0,
            cut_until: 0,
            dies_after: None,
        };
        self.processes.insert(actor, process);
    }

    /// A process is gone.
    pub(crate) fn end(&mut self, actor: Actor) {
        self.processes.remove(&actor);
        self.broker.disconnected(|(puller, _)| *puller == actor);
        match actor {
            Actor::Invoker(number) => {
                if let Some(host) = self.invokers.remove(&number)
                    && let Some(starter) = self.autoscalers.get_mut(&host.starter)
                {
                    starter.ended.push(format!("i{number}"));
                }
            }
            Actor::Gateway(number) => drop(self.gateways.remove(&number)),
            Actor::Autoscaler(number) => drop(self.autoscalers.remove(&number)),
            Actor::Worker(index) => drop(self.windows.remove(&self.workers[index as usize].life)),
            Actor::Store => self.store_serves = false,
            Actor::Broker | Actor::Operator => {}
        }
    }

    /// It will die as soon as this event is over, and is not heard any more.
    pub(crate) fn doom(&mut self, actor: Actor) {
        self.doomed.insert(actor);
    }

    pub(crate) fn dies_after(&mut self, actor: Actor, messages: u32) {
        if let Some(process) = self.processes.get_mut(&actor) {
            process.dies_after = Some(messages);
        }
    }

    pub(crate) fn freeze(&mut self, actor: Actor, until: Millis) {
        if let Some(process) = self.processes.get_mut(&actor) {
            process.frozen_until = until;
        }
    }

    pub(crate) fn disconnect(&mut self, actor: Actor, for_ms: Millis) {
        self.lives += 1;
        let epoch = self.lives;
        if let Some(process) = self.processes.get_mut(&actor) {
            process.up = false;
            process.epoch = epoch;
            process.cut_until = self.now + for_ms;
            self.broker.disconnected(|(puller, _)| *puller == actor);
            self.later(for_ms, Event::Reconnect(actor, epoch));
        }
    }

    pub(crate) fn kill_broker(&mut self, for_ms: Millis) {
        if !self.broker_up {
            return;
        }
        self.broker.restart();
        self.broker_up = false;
        self.broker_life += 1;
        for process in self.processes.values_mut() {
            process.up = false;
            self.lives += 1;
            process.epoch = self.lives;
        }
        self.later(for_ms, Event::Start(Actor::Broker));
    }

    pub(crate) fn remote(&self, actor: Actor) -> Remote {
        match self.processes.get(&actor) {
            Some(process) => process.remote.clone(),
            // Of a process that is gone: nothing comes of it.
            None => Remote::new(self.call_ids.clone()),
        }
    }

    pub(crate) fn spawn(&mut self, actor: Actor, task: impl Future<Output = Done> + 'static) {
        if let Some(process) = self.processes.get_mut(&actor) {
            process.tasks.push(Box::pin(task));
            self.awake.insert(actor);
        }
    }

    pub(crate) fn run_tasks(&mut self, actor: Actor) -> anyhow::Result<()> {
        let Some(process) = self.processes.get_mut(&actor) else { return Ok(()) };
        let (life, remote) = (process.life, process.remote.clone());
        let mut done = Vec::new();
        let mut context = Context::from_waker(Waker::noop());
        process.tasks.retain_mut(|task| match task.as_mut().poll(&mut context) {
            Poll::Ready(end) => {
                done.push(end);
                false
            }
            Poll::Pending => true,
        });
        for (id, ask) in remote.take() {
            if let Ask::Sleep(delay) = ask {
                self.local(delay, actor, Body::Answer(id, Answer::Done));
                continue;
            }
            let to = if matches!(ask, Ask::Store(_)) { Actor::Store } else { Actor::Broker };
            self.send(actor, to, Body::Ask(id, ask));
            self.local(TIMEOUT_MS, actor, Self::call_lost(id));
        }
        if !done.is_empty() {
            self.awake.insert(actor);
        }
        for end in done {
            if self.life(actor) != life || self.doomed.contains(&actor) {
                break;
            }
            match actor {
                Actor::Worker(index) => self.worker_done(index, end),
                Actor::Gateway(number) => self.gateway_done(number, end),
                Actor::Autoscaler(number) => self.autoscaler_done(number, end),
                Actor::Invoker(number) => self.invoker_done(number, end),
                Actor::Store => self.store_done(end)?,
                Actor::Operator => self.operator_done(end),
                Actor::Broker => {}
            }
        }
        Ok(())
    }

    /// Sends a message. Where the sender is not connected, its client keeps it until it is.
    pub(crate) fn send(&mut self, from: Actor, to: Actor, body: Body) {
        if self.doomed.contains(&from) {
            return;
        }
        let door = |one, other| matches!((one, other), (Actor::Invoker(_), Actor::Store));
        let direct = self.direct && (door(from, to) || door(to, from));
        if let Some(process) = self.processes.get_mut(&from) {
            match &mut process.dies_after {
                Some(0) => return self.doom(from),
                Some(left) => *left -= 1,
                None => {}
            }
            if !process.up && !direct {
                process.outbox.push((to, body));
                return;
            }
        }
        let delay = if self.rng.random_bool(0.05) {
            self.rng.random_range(0..150)
        } else {
            self.rng.random_range(0..8)
        };
        // A connection keeps the order of all that is sent on it.
        let class = if from == Actor::Broker { body.class() } else { 0 };
        let last = self.last.entry((from, to, class)).or_default();
        let at = (self.now + delay).max(*last);
        *last = at;
        if matches!(body, Body::Hint(_)) {
            // Nothing depends on hints, so they may come late or never.
            match self.rng.random_range(0..10) {
                0..5 => return,
                5 => self.last.insert((from, to, class), at + 500).map_or((), drop),
                _ => {}
            }
        }
        let at = self.last.get(&(from, to, class)).copied().unwrap_or(at).max(at);
        let mark = |actor| if direct { self.life(actor) } else { self.epoch(actor) };
        let message = Event::Message { from: (from, mark(from)), to: (to, mark(to)), direct, body };
        self.at(at, message);
    }
}
