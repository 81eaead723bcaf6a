//! Invokers as pods: a Deployment that is scaled.

use serde::{Deserialize, Serialize};

#[cfg(feature = "kubernetes")]
pub use scale::KubernetesActuator;

/// Settings for invokers in pods.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct KubernetesConfig {
    /// Namespace of the Deployment; empty = that of the autoscaler's own pod or kubeconfig. Default empty.
    pub namespace: String,
    /// The Deployment. Its pods run `thalweg invoker`. Default `thalweg-invoker`.
    pub deployment: String,
}

impl Default for KubernetesConfig {
    fn default() -> Self {
        Self { namespace: String::new(), deployment: "thalweg-invoker".to_owned() }
    }
}

#[cfg(feature = "kubernetes")]
mod scale {
    use std::time::{Duration, Instant};

    use async_trait::async_trait;
    use k8s_openapi::api::apps::v1::Deployment;
    use kube::{
        Api, Client, Config,
        api::{Patch, PatchParams},
    };
    use tokio::task::JoinHandle;

    use super::KubernetesConfig;
    use crate::{Actuator, ActuatorError, StartError};

    /// Longest wait for an answer of the API server.
    const ANSWER: Duration = Duration::from_secs(5);
    /// Pause before the next attempt after one that failed.
    const AGAIN: Duration = Duration::from_secs(2);
    /// The number is looked at again this often, in case somebody else has changed it.
    const LOOK: Duration = Duration::from_secs(15);

    /// Scales a Deployment to as many pods as there should be invokers.
    ///
    /// It is Kubernetes that chooses ids, and which pods end: so nothing is started or stopped by id, partitions are
    /// placed on every invoker that beats, and a pod that is told to end drains. At the end of the autoscaler nothing
    /// is stopped, for the next one may be another pod of the same.
    #[derive(Debug)]
    pub struct KubernetesActuator {
        deployments: Deployments,
        name: String,
        asked: Option<Asked>,
        /// The attempt that is under way: nobody waits for the API server.
        attempt: Option<JoinHandle<Result<(), String>>>,
    }

    /// The last attempt.
    #[derive(Debug)]
    struct Asked {
        invokers: usize,
        at: Instant,
        worked: bool,
    }

    #[derive(Clone)]
    struct Deployments(Api<Deployment>);

    impl std::fmt::Debug for Deployments {
        fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
            f.write_str(self.0.resource_url())
        }
    }

    impl KubernetesActuator {
        /// By the credentials of this pod, or those of the kubeconfig.
        ///
        /// # Errors
        /// When there are none that can be read. Whether they suffice shows when it scales.
        pub async fn open(config: KubernetesConfig) -> Result<Self, StartError> {
            let cluster = Config::infer().await.map_err(|error| StartError::Kubernetes(error.to_string()))?;
            Self::with(config, cluster)
        }

        /// By these credentials.
        ///
        /// # Errors
        /// When they cannot be used.
        pub fn with(config: KubernetesConfig, cluster: Config) -> Result<Self, StartError> {
            let client =
                Client::try_from(cluster).map_err(|error| StartError::Kubernetes(error.to_string()))?;
            let deployments = match config.namespace.as_str() {
                "" => Api::default_namespaced(client),
                namespace => Api::namespaced(client, namespace),
            };
            Ok(Self {
                deployments: Deployments(deployments),
                name: config.deployment,
                asked: None,
                attempt: None,
            })
        }
    }

    impl Drop for KubernetesActuator {
        fn drop(&mut self) {
            if let Some(attempt) = &self.attempt {
                attempt.abort();
            }
        }
    }

    impl Deployments {
        async fn set(&self, name: &str, invokers: usize) -> Result<(), kube::Error> {
            let wanted = i32::try_from(invokers).unwrap_or(i32::MAX);
            let current = self.0.get_scale(name).await?;
            let current = current.spec.and_then(|spec| spec.replicas).unwrap_or(0);
            if current != wanted {
                let patch = serde_json::json!({ "spec": { "replicas": wanted } });
                self.0.patch_scale(name, &PatchParams::default(), &Patch::Merge(&patch)).await?;
                tracing::info!(deployment = name, current, wanted, "scaled");
            }
            Ok(())
        }

        /// As [`Self::set`], for a bounded time and with the whole story.
        async fn try_to_set(self, name: String, invokers: usize) -> Result<(), String> {
            let set = match tokio::time::timeout(ANSWER, self.set(&name, invokers)).await {
                Ok(set) => set.map_err(|error| error.to_string()),
                Err(_) => Err("no answer in time".to_owned()),
            };
            set.map_err(|error| format!("{}/{name}/scale: {error}", self.0.resource_url()))
        }
    }

    #[async_trait]
    impl Actuator for KubernetesActuator {
        fn starts(&self) -> bool {
            false
        }

        async fn start(&mut self, id: &str) -> Result<(), ActuatorError> {
            Err(ActuatorError::new(id, StartError::Elsewhere))
        }

        async fn stop(&mut self, _id: &str) {}

        async fn reap(&mut self) -> Vec<String> {
            Vec::new()
        }

        async fn scale(&mut self, invokers: usize) -> Result<(), StartError> {
            if let Some(attempt) = self.attempt.take_if(|attempt| attempt.is_finished()) {
                // One that panicked has not worked either.
                let ended = attempt.await.unwrap_or_else(|error| Err(error.to_string()));
                if let Some(asked) = &mut self.asked {
                    (asked.at, asked.worked) = (Instant::now(), ended.is_ok());
                }
                ended.map_err(StartError::Kubernetes)?;
            }
            let due = self.asked.as_ref().is_none_or(|asked| match asked.worked {
                true => asked.invokers != invokers || asked.at.elapsed() >= LOOK,
                false => asked.at.elapsed() >= AGAIN,
            });
            if due && self.attempt.is_none() {
                self.asked = Some(Asked { invokers, at: Instant::now(), worked: true });
                let attempt = self.deployments.clone().try_to_set(self.name.clone(), invokers);
                self.attempt = Some(tokio::spawn(attempt));
            }
            Ok(())
        }

        async fn stop_all(&mut self) {}
    }
}
