//! Detection of the storage of this cluster's data, once at start; and installation of the CRDs
//! that `crd.projectcalico.org/v1` lacks.

use anyhow::{Context, bail};
use k8s_openapi::api::apps::v1::DaemonSet;
use k8s_openapi::apiextensions_apiserver::pkg::apis::apiextensions::v1::CustomResourceDefinition;
use kube::api::{ApiResource, DynamicObject, ListParams, Patch, PatchParams};
use kube::core::GroupVersionKind;
use kube::{Api, Client, Error, ResourceExt};
use margay_api::crds;
use margay_api::storage::mode::{self, Decision, Evidence};
use margay_api::storage::{Kind, Mode};
use tracing::info;

use crate::client::bounded;
use crate::manifest::MANAGER;
use crate::names::{NAMESPACE, NODE, STORAGE_VARIABLE};

/// Pause between attempts to list the API groups.
const PAUSE: std::time::Duration = std::time::Duration::from_secs(2);
/// Name of the object that migrates a cluster's data from the older storage to the newer one.
const MIGRATION: &str = "v1-to-v3";

/// Determines the storage: the setting, else the one that running agents have, because they have
/// written there; else from the API groups that are served.
pub async fn find(client: &Client, setting: &str) -> anyhow::Result<Mode> {
    let agents: Api<DaemonSet> = Api::namespaced(client.clone(), NAMESPACE);
    let running = bounded(agents.get_opt(NODE))
        .await
        .with_context(|| format!("DaemonSet {NAMESPACE}/{NODE}"))?;
    let earlier = running.as_ref().map(written_to).unwrap_or_default();
    let list = async || evidence(client).await;
    let setting = if setting.is_empty() {
        &earlier
    } else {
        setting
    };
    let Decision { mode, reason } =
        mode::discover(setting, list, async || tokio::time::sleep(PAUSE).await).await?;
    info!(storage = %mode, reason, "storage of Calico's data");
    Ok(mode)
}

/// Returns the storage that running agents write to; those without the variable write to the newer
/// one.
fn written_to(agents: &DaemonSet) -> String {
    let pod = agents.spec.template.spec.as_ref();
    let variables = pod
        .into_iter()
        .flat_map(|pod| &pod.containers)
        .flat_map(|container| container.env.iter().flatten());
    let mut values = variables
        .filter(|variable| variable.name == STORAGE_VARIABLE)
        .filter_map(|found| found.value.clone());
    values.next().unwrap_or_else(|| Mode::V3.api_version())
}

async fn evidence(client: &Client) -> Result<Evidence, Error> {
    let groups = bounded(client.list_api_groups()).await?.groups;
    let groups: Vec<String> = groups.into_iter().map(|group| group.name).collect();
    let names = GroupVersionKind::gvk("migration.projectcalico.org", "v1", "DatastoreMigration");
    let migrations: Api<DynamicObject> = Api::all_with(
        client.clone(),
        &ApiResource::from_gvk_with_plural(&names, "datastoremigrations"),
    );
    let mut migration = None;
    if groups.contains(&names.group) {
        let found = bounded(migrations.get_opt(MIGRATION)).await?;
        migration =
            found.and_then(|found| found.data["status"]["phase"].as_str().map(str::to_owned));
    }
    Ok(Evidence { groups, migration })
}

/// Makes sure that the storage is usable: that the operator may read it, and that it has every kind
/// that components wait for. Existing CRDs are left as they are.
pub async fn prepare(client: &Client, mode: Mode) -> anyhow::Result<()> {
    if mode == Mode::V1 {
        let served = bounded(client.list_api_group_resources(&mode.api_version())).await;
        let served = served.with_context(|| {
            format!("{mode} is not served; install the CRDs of the cluster's Calico")
        })?;
        let served: Vec<String> = served
            .resources
            .into_iter()
            .map(|resource| resource.name)
            .collect();
        for definition in missing(&served) {
            let name = definition.name_any();
            install(client, &definition)
                .await
                .map_err(|error| refused(error, &name))?;
            info!(
                definition = name,
                "CRD installed: the cluster's Calico is older than this kind"
            );
        }
    }
    let kind = Kind::of("IPPool").expect("pools are one of Calico's kinds");
    let pools: Api<DynamicObject> = Api::all_with(client.clone(), &kind.resource(mode));
    match bounded(pools.list(&ListParams::default().limit(1))).await {
        Err(Error::Api(status)) if status.code == 403 => {
            bail!(refused(Error::Api(status), &mode.to_string()))
        }
        // The watches report other errors.
        _ => Ok(()),
    }
}

/// Returns the definitions of the older storage that are not served and that components need.
fn missing(served: &[String]) -> Vec<CustomResourceDefinition> {
    let is_served =
        |definition: &CustomResourceDefinition| served.contains(&definition.spec.names.plural);
    crds::later()
        .into_iter()
        .filter(|definition| !is_served(definition))
        .collect()
}

/// Uses server-side apply, because only with it RBAC can restrict the creation by name; existing
/// CRDs are not among these.
async fn install(client: &Client, definition: &CustomResourceDefinition) -> Result<(), Error> {
    let definitions: Api<CustomResourceDefinition> = Api::all(client.clone());
    let patch = Patch::Apply(definition);
    bounded(definitions.patch(&definition.name_any(), &PatchParams::apply(MANAGER), &patch))
        .await
        .map(drop)
}

fn refused(error: Error, what: &str) -> anyhow::Error {
    let is_v1 = what.contains(Mode::V1.group());
    let (manifest, other) = if is_v1 {
        ("operator-v1.yaml", "operator.yaml")
    } else {
        ("operator.yaml", "operator-v1.yaml")
    };
    anyhow::anyhow!(
        "{what}: {error}; this cluster's data is in {}, so apply deploy/{manifest} of this \
         version, not deploy/{other}",
        if is_v1 { Mode::V1 } else { Mode::V3 }
    )
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn running_agents_determine_the_storage() {
        let agents = |env: serde_json::Value| -> DaemonSet {
            let containers = json!([{ "name": NODE, "env": env }]);
            let spec =
                json!({ "selector": {}, "template": { "spec": { "containers": containers } } });
            serde_json::from_value(json!({ "metadata": { "name": NODE }, "spec": spec })).unwrap()
        };
        let env = json!([{ "name": STORAGE_VARIABLE, "value": "crd.projectcalico.org/v1" }]);
        assert_eq!(written_to(&agents(env)), "crd.projectcalico.org/v1");
        assert_eq!(written_to(&agents(json!([]))), "projectcalico.org/v3");
    }

    #[test]
    fn only_missing_definitions_are_installed() {
        let names = |served: &[&str]| {
            let served: Vec<String> = served.iter().map(|name| (*name).to_owned()).collect();
            missing(&served)
                .iter()
                .map(|definition| definition.spec.names.plural.clone())
                .collect::<Vec<_>>()
        };
        let all = [
            "bgpfilters",
            "ipreservations",
            "stagedglobalnetworkpolicies",
            "stagedkubernetesnetworkpolicies",
            "stagednetworkpolicies",
            "tiers",
        ];
        assert_eq!(names(&["ippools"]), all);
        let served = ["ippools", "tiers", "bgpfilters", "ipreservations"];
        assert_eq!(names(&served), all[2..5]);
        assert!(names(&all).is_empty());
    }

    #[test]
    fn the_wrong_manifest_is_named() {
        for (what, manifest) in [
            ("crd.projectcalico.org/v1", "apply deploy/operator-v1.yaml"),
            ("projectcalico.org/v3", "apply deploy/operator.yaml"),
        ] {
            let error = refused(Error::LinesCodecMaxLineLengthExceeded, what).to_string();
            assert!(error.contains(manifest), "{error}");
        }
    }
}
