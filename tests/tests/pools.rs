//! Pools: jobs that are served by invokers of their own.

use thalweg_broker::{Connection, NatsConfig, Registry};
use thalweg_protocol::{ErrorCode, FunctionSpec, Name, Placement, placement_key};
use thalweg_sdk::{Client, Error, JobKey};
use thalweg_tests::{cluster::Cluster, eventually, training};
use tokio_util::sync::CancellationToken;

const ROUNDS: u64 = 4;

/// Trains both workers of a job, and compares every result.
async fn train(client: &Client, name: &str, pool: Option<&str>) {
    let function = FunctionSpec::named("sgd").number("lr", 0.05);
    let mut job = training::job(name, function.clone(), 2);
    if let Some(pool) = pool {
        job = job.pool(pool).expect("a name");
    }
    let workers = (0..2).map(|rank| {
        let (client, job) = (client.clone(), job.clone());
        tokio::spawn(async move {
            let mut worker = training::join(&client, &job, rank).await.expect("joined");
            let mut parameters = Vec::new();
            for _ in 0..ROUNDS {
                let (round, flat) = training::round(&mut worker).await.expect("a round");
                assert!(round.counted && !round.superseded);
                parameters = flat;
            }
            worker.leave().await.expect("left");
            parameters
        })
    });
    let expected = training::replay(&function, &training::full_book(2, ROUNDS), ROUNDS);
    for worker in workers.collect::<Vec<_>>() {
        training::assert_same_bits(&worker.await.expect("a worker"), &expected, name);
    }
}

/// Who holds a pool's partitions, without repetition; and the first of them.
async fn holders(registry: &Registry, pool: Option<&str>) -> (Vec<String>, u16) {
    let pool = pool.map(|pool| Name::new(pool).expect("a name"));
    let (placement, _) =
        registry.get::<Placement>(&placement_key(pool.as_ref())).await.expect("the registry answers");
    let placement = placement.unwrap_or_default();
    let mut holders: Vec<_> = placement.partitions.into_iter().filter_map(|placed| placed.holder).collect();
    holders.sort_unstable();
    holders.dedup();
    (holders, placement.first)
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_pool_serves_its_jobs_and_no_others() {
    let cluster = Cluster::start(&["streams.pools.big.partitions=4", "streams.pools.small.partitions=2"]);
    let client = Client::connect(cluster.url()).await.expect("connected");
    let config = NatsConfig { url: cluster.url().to_owned(), ..NatsConfig::default() };
    let stop = CancellationToken::new();
    let connection = Connection::open("test", &config, &stop).await.expect("connecting").expect("connected");
    cluster.pooled_invoker("b0", "big");

    // The shared pool is at zero, and does not hold the job up.
    train(&client, "of-big", Some("big")).await;
    let registry = Registry::open(&connection.jetstream).await.expect("the registry");
    assert_eq!(holders(&registry, Some("big")).await, (vec!["b0".to_owned()], 32));
    assert_eq!(holders(&registry, None).await.0, Vec::<String>::new(), "b0 must not serve the shared pool");

    // Nor does it do the work of the shared pool, whose job waits for an invoker of that.
    let shared = tokio::spawn({
        let client = client.clone();
        async move { train(&client, "shared", None).await }
    });
    let key = JobKey { tenant: "default".parse().expect("a name"), job: "shared".parse().expect("a name") };
    eventually("the workers of the shared job", async || {
        client.job(&key).await.is_ok_and(|(_, roster)| roster.started)
    })
    .await;
    train(&client, "of-big-too", Some("big")).await;
    assert!(!shared.is_finished(), "somebody served the shared pool");
    cluster.invoker("s0", "");
    shared.await.expect("the shared job is served now");
    assert_eq!(holders(&registry, None).await, (vec!["s0".to_owned()], 0));
    assert_eq!(holders(&registry, Some("big")).await, (vec!["b0".to_owned()], 32));
    assert_eq!(holders(&registry, Some("small")).await.0, Vec::<String>::new());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_pool_that_there_is_not_is_refused() {
    let cluster = Cluster::start(&["streams.pools.big.partitions=4"]);
    let client = Client::connect(cluster.url()).await.expect("connected");
    let job = training::job("nowhere", FunctionSpec::named("sum"), 1).pool("bigger").expect("a name");
    match client.open(&job).await {
        Err(Error::Refused(error)) => {
            assert_eq!(error.code, ErrorCode::InvalidSpec);
            assert!(error.message.contains("no pool \"bigger\"; there is big:"), "{error}");
        }
        other => panic!("{other:?}"),
    }
}
