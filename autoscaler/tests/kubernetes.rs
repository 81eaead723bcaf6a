//! Scaling a Deployment, against a server of our own that plays the scale subresource: there is no cluster here.

use std::{
    sync::{Arc, Mutex},
    time::{Duration, Instant},
};

use axum::{
    Json, Router,
    extract::{Path, State},
    http::StatusCode,
    routing::get,
};
use serde_json::{Value, json};
use thalweg_autoscaler::{Actuator as _, KubernetesActuator, KubernetesConfig, StartError};

/// The pods that are wanted, whether nobody may know, and the requests in order.
#[derive(Debug, Default)]
struct Cluster {
    replicas: u64,
    refuses: bool,
    requests: Vec<String>,
}

type Shared = Arc<Mutex<Cluster>>;

fn status(code: StatusCode, reason: &str, message: &str) -> (StatusCode, Json<Value>) {
    let body = json!({
        "kind": "Status", "apiVersion": "v1", "metadata": {}, "status": "Failure",
        "message": message, "reason": reason, "code": code.as_u16(),
    });
    (code, Json(body))
}

fn answer(cluster: &Cluster, namespace: &str, name: &str) -> (StatusCode, Json<Value>) {
    if cluster.refuses {
        return status(StatusCode::FORBIDDEN, "Forbidden", "deployments/scale is forbidden");
    }
    if (namespace, name) != ("training", "thalweg-invoker") {
        let message = format!("deployments.apps {name:?} not found");
        return status(StatusCode::NOT_FOUND, "NotFound", &message);
    }
    let body = json!({
        "kind": "Scale", "apiVersion": "autoscaling/v1",
        "metadata": { "name": name, "namespace": namespace },
        "spec": { "replicas": cluster.replicas },
        "status": { "replicas": cluster.replicas },
    });
    (StatusCode::OK, Json(body))
}

async fn read(
    State(cluster): State<Shared>,
    Path((namespace, name)): Path<(String, String)>,
) -> (StatusCode, Json<Value>) {
    let mut cluster = cluster.lock().expect("not poisoned");
    cluster.requests.push("get".to_owned());
    answer(&cluster, &namespace, &name)
}

async fn patch(
    State(cluster): State<Shared>,
    Path((namespace, name)): Path<(String, String)>,
    body: String,
) -> (StatusCode, Json<Value>) {
    let mut cluster = cluster.lock().expect("not poisoned");
    cluster.requests.push(body.clone());
    let body: Value = serde_json::from_str(&body).expect("JSON");
    cluster.replicas = body["spec"]["replicas"].as_u64().expect("a number");
    answer(&cluster, &namespace, &name)
}

async fn serve() -> (Shared, kube::Config) {
    let shared = Shared::default();
    let path = "/apis/apps/v1/namespaces/{namespace}/deployments/{name}/scale";
    let routes = Router::new().route(path, get(read).patch(patch)).with_state(shared.clone());
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.expect("a port");
    let url = format!("http://{}", listener.local_addr().expect("its address"));
    tokio::spawn(async move { axum::serve(listener, routes).await });
    (shared, kube::Config::new(url.parse().expect("a URL")))
}

fn config(deployment: &str) -> KubernetesConfig {
    KubernetesConfig { namespace: "training".to_owned(), deployment: deployment.to_owned() }
}

/// Scales to `target` until the server has as many, or the actuator says why not.
async fn scale(actuator: &mut KubernetesActuator, cluster: &Shared, target: usize) -> Result<(), StartError> {
    let until = Instant::now() + Duration::from_secs(30);
    loop {
        actuator.scale(target).await?;
        if cluster.lock().expect("not poisoned").replicas == target as u64 {
            return Ok(());
        }
        assert!(Instant::now() < until, "waited too long for {target}");
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
}

#[tokio::test]
async fn the_deployment_follows_the_target() {
    let (cluster, api) = serve().await;
    let mut actuator = KubernetesActuator::with(config("thalweg-invoker"), api).expect("made");
    assert!(!actuator.starts(), "ids are Kubernetes's to choose");
    let error = actuator.start("auto-1").await.expect_err("nothing is started by id");
    assert!(matches!(error.source, StartError::Elsewhere));

    for target in [3, 3, 3, 1] {
        scale(&mut actuator, &cluster, target).await.expect("scaled");
    }
    // Only changes cost requests: a look, and a patch.
    let patched = |replicas: u64| json!({ "spec": { "replicas": replicas } }).to_string();
    let requests = cluster.lock().expect("not poisoned").requests.clone();
    assert_eq!(requests, ["get".to_owned(), patched(3), "get".to_owned(), patched(1)]);

    // The end of an autoscaler is not the end of its invokers.
    actuator.stop("auto-1").await;
    actuator.stop_all().await;
    assert!(actuator.reap().await.is_empty());
    assert_eq!(cluster.lock().expect("not poisoned").replicas, 1);
}

#[tokio::test]
async fn what_is_in_the_way_is_said_and_tried_again() {
    let (cluster, api) = serve().await;
    let mut missing = KubernetesActuator::with(config("another"), api.clone()).expect("made");
    let error = scale(&mut missing, &cluster, 2).await.expect_err("there is none").to_string();
    assert!(error.contains("another") && error.contains("not found"), "{error}");

    cluster.lock().expect("not poisoned").refuses = true;
    let mut actuator = KubernetesActuator::with(config("thalweg-invoker"), api).expect("made");
    let error = scale(&mut actuator, &cluster, 2).await.expect_err("it is forbidden").to_string();
    assert!(error.contains("forbidden"), "{error}");
    cluster.lock().expect("not poisoned").refuses = false;
    scale(&mut actuator, &cluster, 2).await.expect("it is tried again");
}
