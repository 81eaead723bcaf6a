//! Agents: invokers on several hosts, which die with or without them.

use std::collections::{BTreeMap, BTreeSet};

use futures::{FutureExt as _, StreamExt as _};
use thalweg_broker::{Connection, request};
use thalweg_protocol::{
    AgentBeat, AgentReply, AgentRequest, ErrorCode, FunctionSpec, Incarnation, InvokerBeat, Kind, Name,
    frame, subjects,
};
use thalweg_sdk::{Client, Worker};
use thalweg_tests::{
    PATIENCE,
    actuators::{kill, processes_of},
    cluster::Cluster,
    connect, eventually,
    training::{self, Book},
};

/// What agents say, by their names.
struct Agents {
    connection: Connection,
    beats: async_nats::Subscriber,
    newest: BTreeMap<String, AgentBeat>,
}

impl Agents {
    async fn listen(cluster: &Cluster) -> Self {
        let connection = connect(cluster.url()).await;
        let beats = connection.client.subscribe(subjects::AGENT_BEATS).await.expect("subscribed");
        connection.client.flush().await.expect("flushed");
        Self { connection, beats, newest: BTreeMap::new() }
    }

    fn of(&mut self, name: &str) -> Option<&AgentBeat> {
        while let Some(Some(message)) = self.beats.next().now_or_never() {
            let (beat, _) = frame::open::<AgentBeat>(Kind::AgentBeat, &message.payload).expect("a heartbeat");
            self.newest.insert(beat.agent.clone(), beat);
        }
        self.newest.get(name)
    }

    /// The invokers on an agent, once there are so many.
    async fn invokers(&mut self, name: &str, count: usize) -> BTreeSet<String> {
        eventually(&format!("{count} invokers on {name}"), async || {
            self.of(name).is_some_and(|beat| beat.invokers.len() == count)
        })
        .await;
        self.newest[name].invokers.iter().map(ToString::to_string).collect()
    }

    async fn ask(&self, life: Incarnation, request_: AgentRequest) -> AgentReply {
        let (kinds, to) = ((Kind::AgentRequest, Kind::AgentReply), subjects::agent(life));
        request(&self.connection.client, &to, kinds, &request_, &[], PATIENCE).await.expect("an answer").0
    }
}

/// Trains round after round, until `done`.
async fn train(workers: &mut [Worker], book: &mut Book, mut done: impl FnMut() -> bool) -> Vec<f32> {
    let mut parameters = Vec::new();
    let until = std::time::Instant::now() + PATIENCE;
    while !done() {
        assert!(std::time::Instant::now() < until, "it takes too long");
        let rounds = workers.iter_mut().map(training::round);
        let results = futures::future::try_join_all(rounds).await.expect("a round");
        for worker in workers.iter() {
            for (shard, version, counted) in worker.ledgers() {
                book.insert((version, shard as usize), counted);
            }
        }
        parameters = results.into_iter().next().expect("a worker").1;
    }
    parameters
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn training_survives_hosts_agents_and_autoscalers() {
    let cluster = Cluster::start(&[
        "autoscaler.actuator=agent",
        "autoscaler.policy.min_invokers=4",
        "autoscaler.policy.max_invokers=4",
        "agent.beat_ms=100",
        "invoker.drain_ms=1000",
    ]);
    let mut agents = Agents::listen(&cluster).await;
    cluster.agent("left", 2);
    cluster.agent("right", 2);
    let left = agents.invokers("left", 2).await;
    let right = agents.invokers("right", 2).await;

    let function = FunctionSpec::named("sgd").number("lr", 0.05).number("momentum", 0.9);
    let job = training::job("hosts", function.clone(), 3);
    let client = Client::connect(cluster.url()).await.expect("connected");
    let mut workers = training::join_all(&client, &job, 3).await;
    let mut book = Book::new();
    train(&mut workers, &mut book, counter(3)).await;

    // A host goes, with all that is on it.
    kill(&left.iter().flat_map(|id| processes_of(id)).chain([cluster.process("left")]).collect::<Vec<_>>());
    train(&mut workers, &mut book, counter(3)).await;
    cluster.agent("again", 2);
    let again = agents.invokers("again", 2).await;
    train(&mut workers, &mut book, counter(3)).await;

    // The autoscaler goes. The next one uses what is there.
    cluster.kill("autoscaler");
    train(&mut workers, &mut book, counter(3)).await;
    cluster.start_again("autoscaler");
    train(&mut workers, &mut book, counter(3)).await;
    assert_eq!(agents.invokers("again", 2).await, again, "they were kept");
    assert_eq!(agents.invokers("right", 2).await, right, "they were kept");

    // An agent goes, and its invokers with it: nobody could stop them any more.
    cluster.kill("right");
    train(&mut workers, &mut book, || right.iter().all(|id| processes_of(id).is_empty())).await;
    let parameters = train(&mut workers, &mut book, counter(3)).await;
    let rounds = workers[0].round() - 1;
    training::assert_same_bits(&parameters, &training::replay(&function, &book, rounds), "a replay");

    // Those that were adopted are this autoscaler's to stop.
    cluster.stop("autoscaler");
    agents.invokers("again", 0).await;
    assert!(again.iter().all(|id| processes_of(id).is_empty()));
}

/// Says that it is done when it was asked more than `rounds` times.
fn counter(rounds: usize) -> impl FnMut() -> bool {
    let mut asked = 0;
    move || {
        asked += 1;
        asked > rounds
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn commands_can_be_repeated_and_refusals_are_typed() {
    let cluster = Cluster::start(&["agent.beat_ms=100"]);
    let mut agents = Agents::listen(&cluster).await;
    cluster.agent("host", 1);
    agents.invokers("host", 0).await;
    let life = agents.newest["host"].life;
    let start = |id: &str| AgentRequest::Start { invoker: Name::new(id).expect("a name") };
    let stop = |id: &str| AgentRequest::Stop { invoker: Name::new(id).expect("a name") };
    let refused = |reply: AgentReply| match reply {
        AgentReply::Error(error) => error.code,
        AgentReply::Done { .. } => panic!("it was done"),
    };

    for _ in 0..2 {
        assert_eq!(agents.ask(life, start("one")).await, AgentReply::Done { changes: 1 });
    }
    assert_eq!(refused(agents.ask(life, start("two")).await), ErrorCode::Limit);
    assert_eq!(agents.ask(life, stop("nobody")).await, AgentReply::Done { changes: 1 });
    let odd = agents.connection.client.request(subjects::agent(life), "no frame".into()).await;
    let (odd, _) =
        frame::open::<AgentReply>(Kind::AgentReply, &odd.expect("an answer").payload).expect("a frame");
    assert_eq!(refused(odd), ErrorCode::Malformed);

    // While it hears of nobody it keeps what it has.
    let before = processes_of("one");
    assert_eq!(before.len(), 1);
    let mut connects = agents.connection.connects();
    connects.mark_unchanged();
    cluster.kill("nats");
    connects.changed().await.expect("connected again");
    agents.of("host");
    agents.newest.clear();
    agents.invokers("host", 1).await;
    assert_eq!(processes_of("one"), before);
    assert_eq!(agents.newest["host"].life, life);

    for _ in 0..2 {
        assert!(matches!(agents.ask(life, stop("one")).await, AgentReply::Done { .. }));
    }
    agents.invokers("host", 0).await;
    assert!(processes_of("one").is_empty());
    assert_eq!(refused(agents.ask(life, start("one")).await), ErrorCode::Gone);

    // Told to end, it ends its invokers first.
    assert!(matches!(agents.ask(life, start("three")).await, AgentReply::Done { .. }));
    agents.invokers("host", 1).await;
    cluster.stop("host");
    agents.invokers("host", 0).await;
    assert!(agents.newest["host"].slots == 0 && processes_of("three").is_empty());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn no_invoker_is_left_when_all_else_is_gone() {
    let cluster = Cluster::start(&["agent.beat_ms=100", "invoker.drain_ms=300"]);
    let mut agents = Agents::listen(&cluster).await;
    cluster.agent("host", 1);
    agents.invokers("host", 0).await;
    let id = format!("orphan-{:08x}", rand::random::<u32>());
    let mut beats =
        agents.connection.client.subscribe(subjects::invoker_beat(None, &id)).await.expect("subscribed");
    let start = AgentRequest::Start { invoker: Name::new(id.clone()).expect("a name") };
    let started = agents.ask(agents.newest["host"].life, start).await;
    assert!(matches!(started, AgentReply::Done { .. }), "{started:?}");
    eventually("it to hold partitions", async || {
        let beat = beats.next().now_or_never().flatten();
        beat.is_some_and(|beat| {
            let (beat, _) = frame::open::<InvokerBeat>(Kind::Beat, &beat.payload).expect("a heartbeat");
            !beat.partitions.is_empty()
        })
    })
    .await;
    // Agent, autoscaler and nats-server are killed at once: nobody can relieve it, and nobody can stop it.
    drop(cluster);
    eventually("the invoker to end by itself", async || processes_of(&id).is_empty()).await;
}
