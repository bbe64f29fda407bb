//! Requests to a real API server by users with limited rights, and which of them it grants. The
//! tables are data.

mod table;

use std::collections::BTreeMap;
use std::path::Path;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use kube::api::{Api, DeleteParams, DynamicObject, Patch, PatchParams, PostParams, TypeMeta};
use kube::config::{KubeConfigOptions, Kubeconfig};
use kube::core::ApiResource;
use kube::{Client, Config, ResourceExt};
use margay_api::storage::{self, Kind, Mode};
use serde::Deserialize;
use serde::de::DeserializeOwned;
use serde_json::{Value, json};

use crate::cluster::Cluster;
use crate::install::checkout;

use table::Request;
pub use table::Requests;

/// Time limit for new rules to take effect in the API server.
const PATIENCE: Duration = Duration::from_secs(30);

/// Result of a request.
pub const GRANTED: &str = "granted";
/// Part of RBAC's refusals.
const CANNOT: &str = "cannot";

/// A table of `tests/data`.
pub fn table<T: DeserializeOwned>(name: &str) -> Result<T> {
    let path = checkout().join("tests/data").join(name);
    table::parse(&std::fs::read_to_string(&path)?).with_context(|| path.display().to_string())
}

/// Applies those objects of a golden file of the operator that grant or restrict rights.
pub fn apply_rules(cluster: &Cluster, golden: &str) -> Result<()> {
    const KINDS: [&str; 8] = [
        "Namespace",
        "ServiceAccount",
        "ClusterRole",
        "ClusterRoleBinding",
        "ValidatingAdmissionPolicy",
        "ValidatingAdmissionPolicyBinding",
        "MutatingAdmissionPolicy",
        "MutatingAdmissionPolicyBinding",
    ];
    let text = std::fs::read_to_string(checkout().join("operator/tests/golden").join(golden))?;
    let mut objects = Vec::new();
    for document in serde_yaml_ng::Deserializer::from_str(&text) {
        let mut object = Value::deserialize(document)?;
        if KINDS.iter().any(|kind| object["kind"] == *kind) {
            object["metadata"]
                .as_object_mut()
                .map(|metadata| metadata.remove("ownerReferences"));
            objects.push(object);
        }
    }
    let file = cluster.folder().join(golden).with_extension("json");
    let list = json!({"apiVersion": "v1", "kind": "List", "items": objects});
    std::fs::write(&file, list.to_string())?;
    cluster.kubectl(&[
        "apply",
        "--server-side",
        "--force-conflicts",
        "-f",
        &file.display().to_string(),
    ])?;
    Ok(())
}

/// A user of the API.
#[derive(Clone)]
pub struct ApiUser {
    client: Client,
    mode: Mode,
}

impl ApiUser {
    /// The user that `change` makes of the administrator.
    pub async fn new(
        cluster: &Cluster,
        mode: Mode,
        change: impl FnOnce(&mut Config),
    ) -> Result<Self> {
        let file = Kubeconfig::read_from(cluster.kubeconfig())?;
        let mut config =
            Config::from_custom_kubeconfig(file, &KubeConfigOptions::default()).await?;
        change(&mut config);
        Ok(Self {
            client: Client::try_from(config)?,
            mode,
        })
    }

    /// The administrator.
    pub async fn administrator(cluster: &Cluster, mode: Mode) -> Result<Self> {
        Self::new(cluster, mode, |_| ()).await
    }

    /// The user of that token.
    pub async fn with_token(cluster: &Cluster, mode: Mode, token: &str) -> Result<Self> {
        let token = token.to_owned();
        Self::new(cluster, mode, |config| {
            config.auth_info = kube::config::AuthInfo {
                token: Some(token.into()),
                ..Default::default()
            };
        })
        .await
    }

    /// The user of that name.
    pub async fn user(cluster: &Cluster, mode: Mode, name: &str) -> Result<Self> {
        Self::new(cluster, mode, |config| {
            config.auth_info.impersonate = Some(name.to_owned())
        })
        .await
    }

    fn resource(&self, object: &Value) -> ApiResource {
        let kind = object["kind"].as_str().unwrap_or_default();
        match Kind::of(kind) {
            Some(kind) => kind.resource(self.mode),
            None => {
                let (group, version) = match kind {
                    "CertificateSigningRequest" => ("certificates.k8s.io", "v1"),
                    _ => ("", "v1"),
                };
                ApiResource::from_gvk(&kube::core::GroupVersionKind::gvk(group, version, kind))
            }
        }
    }

    fn api(&self, object: &Value) -> Api<DynamicObject> {
        let resource = self.resource(object);
        match object["metadata"]["namespace"].as_str() {
            Some(namespace) => Api::namespaced_with(self.client.clone(), namespace, &resource),
            None => Api::all_with(self.client.clone(), &resource),
        }
    }

    fn stored(&self, object: &Value) -> Result<DynamicObject> {
        let kind = object["kind"].as_str().unwrap_or_default();
        let stored = match Kind::of(kind) {
            Some(kind) => storage::encode(self.mode, kind, object)?,
            None => object.clone(),
        };
        let mut stored: DynamicObject = serde_json::from_value(stored)?;
        let resource = self.resource(object);
        stored.types = Some(TypeMeta {
            api_version: resource.api_version,
            kind: resource.kind,
        });
        Ok(stored)
    }

    /// Creates the object. Returns the refusal, if there is one.
    pub async fn create(&self, object: &Value) -> Result<String> {
        answer(
            self.api(object)
                .create(&PostParams::default(), &self.stored(object)?)
                .await,
        )
    }

    /// Writes the object whole, as changed from what is there.
    pub async fn update(&self, object: &Value, administrator: &Self) -> Result<String> {
        let mut wanted = self.stored(object)?;
        let name = wanted.name_any();
        wanted.metadata.resource_version = administrator
            .api(object)
            .get(&name)
            .await?
            .metadata
            .resource_version;
        answer(
            self.api(object)
                .replace(&name, &PostParams::default(), &wanted)
                .await,
        )
    }

    /// Patches the object, or a part of it.
    pub async fn patch(&self, object: &Value, part: &str, change: &Value) -> Result<String> {
        let (api, name, params) = (
            self.api(object),
            self.stored(object)?.name_any(),
            PatchParams::default(),
        );
        answer(match part {
            "" => api.patch(&name, &params, &Patch::Merge(change)).await,
            part => {
                api.patch_subresource(part, &name, &params, &Patch::Merge(change))
                    .await
            }
        })
    }

    /// Deletes the object.
    pub async fn delete(&self, object: &Value) -> Result<String> {
        answer(
            self.api(object)
                .delete(&self.stored(object)?.name_any(), &DeleteParams::default())
                .await,
        )
    }

    /// Removes the object despite finalizers; a success if there is none.
    pub async fn clear(&self, object: &Value) -> Result<()> {
        let (api, name) = (self.api(object), self.stored(object)?.name_any());
        let freed = json!({"metadata": {"finalizers": null, "ownerReferences": null}});
        for outcome in [
            api.patch(&name, &PatchParams::default(), &Patch::Merge(freed))
                .await
                .map(drop),
            api.delete(&name, &DeleteParams::default().grace_period(0))
                .await
                .map(drop),
        ] {
            match outcome {
                Err(kube::Error::Api(status)) if status.code == 404 => {}
                outcome => outcome?,
            }
        }
        Ok(())
    }
}

fn answer<T>(outcome: kube::Result<T>) -> Result<String> {
    match outcome {
        Ok(_) => Ok(GRANTED.to_owned()),
        Err(kube::Error::Api(status)) => Ok(status.message.clone()),
        Err(error) => Err(error.into()),
    }
}

/// Asks until the answer has the part: rules come into force some time after they were written.
pub async fn until<F: Future<Output = Result<String>>>(
    part: &str,
    ask: impl Fn() -> F,
) -> Result<()> {
    let begin = std::time::Instant::now();
    loop {
        let answer = ask().await?;
        if answer.contains(part) {
            return Ok(());
        }
        ensure!(
            begin.elapsed() < PATIENCE,
            "wanted {part:?}, is {answer:?} after {PATIENCE:?}"
        );
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
}

/// Waits until admission is active. Each policy becomes so by itself, some time after it was
/// applied, so one row of each refusal is asked until it is refused.
async fn wait_for_admission(
    requests: &Requests,
    agent: &ApiUser,
    administrator: &ApiUser,
) -> Result<()> {
    let mut refusals = BTreeMap::new();
    for row in &requests.rows {
        if ![GRANTED, CANNOT].contains(&row.answer.as_str()) {
            refusals.entry(row.answer.as_str()).or_insert(row);
        }
    }
    for (answer, row) in refusals {
        until(answer, || one(row, requests, agent, administrator))
            .await
            .with_context(|| row.what.clone())?;
    }
    Ok(())
}

/// Asks every row of the table; the error names those that were answered otherwise.
pub async fn ask(requests: &Requests, agent: &ApiUser, administrator: &ApiUser) -> Result<()> {
    wait_for_admission(requests, agent, administrator).await?;
    let mut wrong = Vec::new();
    for row in &requests.rows {
        let answer = one(row, requests, agent, administrator)
            .await
            .with_context(|| row.what.clone())?;
        wrong.extend(row.fault(&answer));
    }
    ensure!(
        wrong.is_empty(),
        "{} of {}:\n{}",
        wrong.len(),
        requests.rows.len(),
        wrong.join("\n")
    );
    Ok(())
}

/// Under `strictAffinity` nothing is borrowed, and what was borrowed is given back.
pub async fn ask_under_strict_affinity(
    requests: &Requests,
    agent: &ApiUser,
    administrator: &ApiUser,
) -> Result<()> {
    let row = |what: &str| {
        requests
            .rows
            .iter()
            .find(|row| row.what == what)
            .with_context(|| format!("no row {what}"))
    };
    let (borrowed, given_back) = (
        row("an address is borrowed")?,
        row("what was borrowed is given back and attributes are renumbered")?,
    );
    let settings = json!({"kind": "IPAMConfiguration", "metadata": {"name": "default"},
        "spec": {"strictAffinity": true, "autoAllocateBlocks": true}});
    administrator.clear(&settings).await?;
    administrator.create(&settings).await?;
    until("has strictAffinity", || {
        one(borrowed, requests, agent, administrator)
    })
    .await?;
    until(GRANTED, || one(given_back, requests, agent, administrator)).await?;
    administrator.clear(&settings).await?;
    until(GRANTED, || one(borrowed, requests, agent, administrator)).await
}

async fn one(
    row: &Request,
    requests: &Requests,
    agent: &ApiUser,
    administrator: &ApiUser,
) -> Result<String> {
    let (before, after) = requests.objects_of(row);
    let stays = ["Node", "Pod"].iter().any(|kind| before["kind"] == *kind);
    if !stays {
        administrator.clear(&before).await?;
        if row.verb != "create" {
            let made = administrator.create(&before).await?;
            ensure!(made == GRANTED, "the administrator: {made}");
        }
    }
    let answer = match row.verb.as_str() {
        "create" => agent.create(&after).await?,
        "update" => agent.update(&after, administrator).await?,
        "patch" => agent.patch(&before, &row.sub, &row.with).await?,
        _ => agent.delete(&before).await?,
    };
    if !stays {
        administrator.clear(&after).await?;
        administrator.clear(&before).await?;
    }
    Ok(answer)
}

/// The table of `tier-rights.yaml`.
#[derive(Deserialize)]
pub struct Tiers {
    users: BTreeMap<String, Vec<Value>>,
    rows: Vec<TierRow>,
}

#[derive(Deserialize)]
struct TierRow {
    user: String,
    verb: String,
    kind: String,
    name: String,
    #[serde(default)]
    from: Option<String>,
    #[serde(default)]
    tier: Option<String>,
    answer: String,
}

/// Text of the refusal by a tier's rights.
const TIER: &str = "permission to get the tier";

/// Gives each user of the table his roles, and asks every row.
pub async fn ask_of_tiers(
    tiers: &Tiers,
    cluster: &Cluster,
    mode: Mode,
    namespace: &str,
) -> Result<()> {
    roles(tiers, cluster, mode)?;
    let administrator = ApiUser::administrator(cluster, mode).await?;
    let policy = |row: &TierRow, tier: &Option<String>| {
        let mut object = json!({
            "kind": row.kind,
            "metadata": {"name": row.name},
            "spec": {"selector": "all()"},
        });
        if !row.kind.contains("Global") {
            object["metadata"]["namespace"] = namespace.into();
        }
        tier.iter()
            .for_each(|tier| object["spec"]["tier"] = tier.as_str().into());
        if row.kind.starts_with("Staged") {
            object["spec"]["stagedAction"] = "Set".into();
        }
        object
    };
    let mut wrong = Vec::new();
    for (index, row) in tiers.rows.iter().enumerate() {
        let user = ApiUser::user(cluster, mode, &row.user).await?;
        let (before, after) = (policy(row, &row.from), policy(row, &row.tier));
        if index == 0 {
            until(TIER, || async {
                administrator.clear(&after).await?;
                user.create(&after).await
            })
            .await?;
        }
        administrator.clear(&after).await?;
        if row.verb != "create" {
            let made = administrator.create(&before).await?;
            ensure!(made == GRANTED, "the administrator: {made}");
        }
        let answer = match row.verb.as_str() {
            "create" => user.create(&after).await?,
            "update" => user.update(&after, &administrator).await?,
            _ => user.delete(&before).await?,
        };
        administrator.clear(&after).await?;
        let wanted = if row.answer == "tier" {
            TIER
        } else {
            &row.answer
        };
        if !answer.contains(wanted) {
            wrong.push(format!(
                "{}: {} {} {}: wanted {wanted:?}, is {answer:?}",
                row.user, row.verb, row.kind, row.name
            ));
        }
    }
    ensure!(
        wrong.is_empty(),
        "{} of {}:\n{}",
        wrong.len(),
        tiers.rows.len(),
        wrong.join("\n")
    );
    Ok(())
}

/// Everybody may write all kinds of policies; the roles of the table are of the group that users
/// know, in both storages.
fn roles(tiers: &Tiers, cluster: &Cluster, mode: Mode) -> Result<()> {
    let plain = json!({"apiGroups": [mode.group()], "verbs": ["*"], "resources":
    [
        "networkpolicies",
        "globalnetworkpolicies",
        "stagednetworkpolicies",
        "stagedglobalnetworkpolicies",
    ]});
    let mut items = Vec::new();
    for (user, rules) in &tiers.users {
        let mut rules = rules.clone();
        for rule in &mut rules {
            rule["apiGroups"] = if rule["resources"] == json!(["*"]) {
                json!(["*"])
            } else {
                json!(["projectcalico.org"])
            };
        }
        rules.push(plain.clone());
        let (api, name) = ("rbac.authorization.k8s.io/v1", format!("rights-{user}"));
        items.push(json!({
            "apiVersion": api,
            "kind": "ClusterRole",
            "metadata": {"name": name},
            "rules": rules,
        }));
        items.push(json!({
            "apiVersion": api, "kind": "ClusterRoleBinding", "metadata": {"name": name},
            "roleRef": {
                "apiGroup": "rbac.authorization.k8s.io",
                "kind": "ClusterRole",
                "name": name,
            },
            "subjects": [{"apiGroup": "rbac.authorization.k8s.io", "kind": "User", "name": user}],
        }));
    }
    apply(
        cluster,
        "rights-roles.json",
        &json!({"apiVersion": "v1", "kind": "List", "items": items}),
    )
}

/// Applies an object by way of a file in the cluster's folder.
pub fn apply(cluster: &Cluster, file: &str, object: &Value) -> Result<()> {
    let path = cluster.folder().join(Path::new(file));
    std::fs::write(&path, object.to_string())?;
    cluster
        .kubectl(&["apply", "-f", &path.display().to_string()])
        .map(drop)
}
