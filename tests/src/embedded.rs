//! The embedded service, in the test's process.

use std::{net::SocketAddr, path::Path};

use thalweg::{config::Config, up::Service};
use thalweg_sdk::Client;

/// A service with its own nats-server and temporary data.
pub struct Embedded {
    service: Option<Service>,
    /// A client of it.
    pub client: Client,
    directory: tempfile::TempDir,
}

impl Embedded {
    /// Starts a service after `change` has had its way with the configuration.
    ///
    /// # Panics
    /// When it does not start.
    pub async fn start(change: impl FnOnce(&mut Config)) -> Self {
        let directory = tempfile::tempdir().expect("a temporary directory");
        let mut config = Config::default();
        let any = SocketAddr::from(([127, 0, 0, 1], 0));
        config.admin.listen = any;
        config.gateway.http_listen = any;
        config.store.data_dir = directory.path().join("store");
        config.embedded.data_dir = directory.path().join("nats");
        config.embedded.nats_server = Some(crate::nats_server());
        config.embedded.port = 0;
        change(&mut config);
        let service = Service::start(config).await.expect("the service starts");
        let client = Client::connect(service.url()).await.expect("the client connects");
        Self { service: Some(service), client, directory }
    }

    /// The service.
    ///
    /// # Panics
    /// After [`Embedded::stop`].
    #[must_use]
    pub fn service(&self) -> &Service {
        self.service.as_ref().expect("the service runs")
    }

    /// Its directory: data of the store and of nats-server.
    #[must_use]
    pub fn directory(&self) -> &Path {
        self.directory.path()
    }

    /// Value of a counter or gauge, summed over the label sets that contain `labels`.
    ///
    /// Metrics are of the whole test process: compare values before and after.
    #[must_use]
    pub fn metric(name: &str, labels: &str) -> f64 {
        let text = thalweg_telemetry::metrics::install().expect("the recorder is installed").render();
        text.lines()
            .filter(|line| {
                line.strip_prefix(name).is_some_and(|rest| rest.starts_with('{') || rest.starts_with(' '))
            })
            .filter(|line| line.contains(labels))
            .filter_map(|line| line.rsplit(' ').next()?.parse::<f64>().ok())
            .sum()
    }

    /// Stops the service in order.
    ///
    /// # Panics
    /// When a part of it failed.
    pub async fn stop(mut self) {
        if let Some(service) = self.service.take() {
            service.stop().await.expect("the service stops in order");
        }
    }
}
