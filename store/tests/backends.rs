//! Every backend keeps the contract of `ShardStore`.

#![allow(clippy::unwrap_used, reason = "a test that cannot go on panics")]

use std::{sync::Arc, time::Duration};

use thalweg_store::{
    FlushMode, LocalStore, MemoryIndex, MemoryStore, OpenOptions,
    conformance::{self, Subject},
    disk::ForgetfulDisk,
};

const FLUSH: Duration = Duration::from_millis(5);

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn memory() {
    let store: Subject = Arc::new(MemoryStore::default());
    conformance::suite(&store).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn local_on_a_disk_in_memory() {
    let options = OpenOptions {
        disk: Arc::new(ForgetfulDisk::default()),
        index: Arc::new(MemoryIndex::default()),
        flush: FlushMode::Every(FLUSH),
        reserve_bytes: 0,
        boot: "boot".to_owned(),
    };
    let local = LocalStore::open(options).unwrap();
    let store: Subject = Arc::new(local.clone());
    conformance::suite(&store).await;
    local.close().unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn local_on_a_directory_with_sled() {
    let directory = tempfile::tempdir().unwrap();
    let local = LocalStore::open(OpenOptions::directory(directory.path(), FLUSH).unwrap()).unwrap();
    let store: Subject = Arc::new(local.clone());
    conformance::suite(&store).await;
    local.close().unwrap();
}
