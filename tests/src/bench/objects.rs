//! Writes many objects through the API, several at a time, and watches pods become ready.

use std::collections::{BTreeMap, BTreeSet};
use std::future::Future;
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use futures::{StreamExt, TryStreamExt};
use k8s_openapi::api::core::v1::{Namespace, Pod, ServiceAccount};
use k8s_openapi::api::networking::v1::NetworkPolicy;
use kube::api::{DeleteParams, ListParams, PostParams};
use kube::runtime::{WatchStreamExt, watcher};
use kube::{Api, Client, ResourceExt};
use serde_json::{Value, json};
use tokio::runtime::Runtime;

use crate::cluster::Cluster;
use crate::install;
use crate::world;

/// Requests under way at once.
const AT_ONCE: usize = 16;
/// Time limit for many pods at once to start, and for a namespace to be deleted.
const PATIENCE: Duration = Duration::from_secs(300);

/// The API as an administrator sees it, for callers without a runtime of their own.
pub struct Objects {
    runtime: Runtime,
    client: Client,
}

impl Objects {
    /// Connects.
    pub fn new(cluster: &Cluster) -> Result<Self> {
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .build()?;
        let client = runtime.block_on(cluster.client())?;
        Ok(Self { runtime, client })
    }

    /// Waits for work on the runtime.
    pub fn wait<T>(&self, work: impl Future<Output = Result<T>>) -> Result<T> {
        self.runtime.block_on(async {
            tokio::time::timeout(PATIENCE, work)
                .await
                .context("the time was up")?
        })
    }

    /// Makes a namespace unless it is there.
    pub fn namespace(&self, name: &str) -> Result<()> {
        let object: Namespace =
            serde_json::from_value(json!({"metadata": {"name": name, "labels": {"ns": name}}}))?;
        self.wait(async {
            match Api::all(self.client.clone())
                .create(&PostParams::default(), &object)
                .await
            {
                Err(kube::Error::Api(status)) if status.code == 409 => {}
                result => drop(result?),
            }
            // Without its account no pod is admitted.
            let accounts: Api<ServiceAccount> = Api::namespaced(self.client.clone(), name);
            let there = |object: Option<&ServiceAccount>| object.is_some();
            kube::runtime::wait::await_condition(accounts, "default", there).await?;
            Ok(())
        })
    }

    /// Names of the pods of a namespace.
    pub fn names(&self, namespace: &str) -> Result<BTreeSet<String>> {
        let api: Api<Pod> = Api::namespaced(self.client.clone(), namespace);
        self.wait(async {
            Ok(api
                .list_metadata(&ListParams::default())
                .await?
                .items
                .iter()
                .map(ResourceExt::name_any)
                .collect())
        })
    }

    /// Deletes a namespace and waits until it is gone; returns how long that took.
    pub fn drop_namespace(&self, name: &str) -> Result<Duration> {
        let begin = Instant::now();
        let all: Api<Namespace> = Api::all(self.client.clone());
        self.wait(async {
            all.delete(name, &DeleteParams::default()).await?;
            let gone = kube::runtime::wait::await_condition(
                all.clone(),
                name,
                |object: Option<&Namespace>| object.is_none(),
            );
            Ok(gone.await?)
        })?;
        Ok(begin.elapsed())
    }

    /// Makes serving pods in `namespace`, all at once or one after the other, each when the former
    /// one is ready; returns how long each took from its request to its readiness.
    pub fn pods(
        &self,
        namespace: &str,
        pods: &[(String, String)],
        one_by_one: bool,
    ) -> Result<BTreeMap<String, Duration>> {
        let api: Api<Pod> = Api::namespaced(self.client.clone(), namespace);
        let (ready, seen) = tokio::sync::watch::channel(BTreeMap::<String, Instant>::new());
        let watched = api.clone();
        let watching = self.runtime.spawn(async move {
            let events = watcher(watched, watcher::Config::default())
                .default_backoff()
                .applied_objects();
            let mut events = std::pin::pin!(events);
            while let Some(event) = events.next().await {
                let Ok(pod) = event else { continue };
                if install::pod_ready(&pod) {
                    ready.send_modify(|all| {
                        all.entry(pod.name_any()).or_insert_with(Instant::now);
                    });
                }
            }
        });
        let create = |(name, node): (String, String)| {
            let api = &api;
            async move {
                let object: Pod =
                    serde_json::from_value(world::server(&format!("{namespace}/{name}"), &node)?)?;
                let begin = Instant::now();
                api.create(&PostParams::default(), &object).await?;
                anyhow::Ok((name, begin))
            }
        };
        let made: Result<Vec<(String, Instant)>> = self.wait(async {
            if !one_by_one {
                let made = futures::stream::iter(pods.iter().cloned())
                    .map(create)
                    .buffer_unordered(AT_ONCE);
                let made: Vec<(String, Instant)> = made.try_collect().await?;
                let mut seen = seen.clone();
                seen.wait_for(|ready| made.iter().all(|(name, _)| ready.contains_key(name)))
                    .await?;
                return Ok(made);
            }
            let mut made = Vec::new();
            for pod in pods {
                let (name, begin) = create(pod.clone()).await?;
                seen.clone()
                    .wait_for(|ready| ready.contains_key(&name))
                    .await?;
                made.push((name, begin));
            }
            Ok(made)
        });
        watching.abort();
        let ready = seen.borrow();
        let took = |(name, begin): (String, Instant)| {
            let at = *ready
                .get(&name)
                .with_context(|| format!("pod {name} is not ready"))?;
            Ok((name, at.saturating_duration_since(begin)))
        };
        made?.into_iter().map(took).collect()
    }

    /// Makes these policies unless they are there, and returns how many are in the namespace then.
    pub fn policies(&self, namespace: &str, wanted: Vec<Value>) -> Result<usize> {
        let api: Api<NetworkPolicy> = Api::namespaced(self.client.clone(), namespace);
        self.wait(async {
            let present = api.list_metadata(&ListParams::default()).await?.items;
            let present: BTreeSet<String> = present.iter().map(ResourceExt::name_any).collect();
            let create = |object: Value| {
                let api = &api;
                async move {
                    let object: NetworkPolicy = serde_json::from_value(object)?;
                    api.create(&PostParams::default(), &object).await?;
                    anyhow::Ok(())
                }
            };
            let is_missing = |object: &Value| {
                object["metadata"]["name"]
                    .as_str()
                    .is_some_and(|name| !present.contains(name))
            };
            let missing: Vec<Value> = wanted.into_iter().filter(is_missing).collect();
            let count = present.len() + missing.len();
            futures::stream::iter(missing)
                .map(create)
                .buffer_unordered(AT_ONCE)
                .try_collect::<()>()
                .await?;
            Ok(count)
        })
    }
}
