//! Which of the two storages this cluster's data is in, found once; and what the older one lacks.

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

use crate::apply::bounded;
use crate::object::MANAGER;
use crate::render::{NAMESPACE, NODE, STORAGE_VARIABLE};

/// Between attempts to find out what is served.
const PAUSE: std::time::Duration = std::time::Duration::from_secs(2);
/// The object that moves a cluster's data from the older storage to the newer one.
const MIGRATION: &str = "v1-to-v3";

/// Finds the storage: what is set, else what agents were started with, because they have written there; else what the API server serves.
pub async fn find(client: &Client, setting: &str) -> anyhow::Result<Mode> {
    let agents: Api<DaemonSet> = Api::namespaced(client.clone(), NAMESPACE);
    let running = bounded(agents.get_opt(NODE)).await.with_context(|| format!("DaemonSet {NAMESPACE}/{NODE}"))?;
    let earlier = running.as_ref().map(written_to).unwrap_or_default();
    let ask = async || evidence(client).await;
    let setting = if setting.is_empty() { &earlier } else { setting };
    let Decision { mode, reason } = mode::discover(setting, ask, async || tokio::time::sleep(PAUSE).await).await?;
    info!(storage = %mode, reason, "storage of Calico's data");
    Ok(mode)
}

/// The storage that agents write to; those that were not told write to the newer one.
fn written_to(agents: &DaemonSet) -> String {
    let pod = agents.spec.template.spec.as_ref();
    let variables =
        pod.into_iter().flat_map(|pod| &pod.containers).flat_map(|container| container.env.iter().flatten());
    let mut told =
        variables.filter(|variable| variable.name == STORAGE_VARIABLE).filter_map(|found| found.value.clone());
    told.next().unwrap_or_else(|| Mode::V3.api_version())
}

async fn evidence(client: &Client) -> Result<Evidence, Error> {
    let groups = bounded(client.list_api_groups()).await?.groups;
    let groups: Vec<String> = groups.into_iter().map(|group| group.name).collect();
    let names = GroupVersionKind::gvk("migration.projectcalico.org", "v1", "DatastoreMigration");
    let migrations: Api<DynamicObject> =
        Api::all_with(client.clone(), &ApiResource::from_gvk_with_plural(&names, "datastoremigrations"));
    let mut migration = None;
    if groups.contains(&names.group) {
        let found = bounded(migrations.get_opt(MIGRATION)).await?;
        migration = found.and_then(|found| found.data["status"]["phase"].as_str().map(str::to_owned));
    }
    Ok(Evidence { groups, migration })
}

/// Makes sure that the storage can be worked with: that the operator may read it, and that it has every kind that components wait for. Kinds that are
/// there are left as they are, whoever has made them.
pub async fn prepare(client: &Client, mode: Mode) -> anyhow::Result<()> {
    if mode == Mode::V1 {
        let served = bounded(client.list_api_group_resources(&mode.api_version())).await;
        let served =
            served.with_context(|| format!("{mode} is not served; install the definitions of the cluster's Calico"))?;
        let served: Vec<String> = served.resources.into_iter().map(|resource| resource.name).collect();
        for definition in missing(&served) {
            let name = definition.name_any();
            install(client, &definition).await.map_err(|error| refused(error, &name))?;
            info!(definition = name, "made: the cluster's Calico is older than this kind");
        }
    }
    let kind = Kind::of("IPPool").expect("pools are one of Calico's kinds");
    let pools: Api<DynamicObject> = Api::all_with(client.clone(), &kind.resource(mode));
    match bounded(pools.list(&ListParams::default().limit(1))).await {
        Err(Error::Api(status)) if status.code == 403 => bail!(refused(Error::Api(status), &mode.to_string())),
        // What else may be wrong with it is told by the watches.
        _ => Ok(()),
    }
}

/// The definitions of the older storage that are not served and that components need.
fn missing(served: &[String]) -> Vec<CustomResourceDefinition> {
    let is_served = |definition: &CustomResourceDefinition| served.contains(&definition.spec.names.plural);
    crds::later().into_iter().filter(|definition| !is_served(definition)).collect()
}

/// By server-side apply, because a right to create can be bounded to names only so; what exists is not among these.
async fn install(client: &Client, definition: &CustomResourceDefinition) -> Result<(), Error> {
    let definitions: Api<CustomResourceDefinition> = Api::all(client.clone());
    let patch = Patch::Apply(definition);
    bounded(definitions.patch(&definition.name_any(), &PatchParams::apply(MANAGER), &patch)).await.map(drop)
}

fn refused(error: Error, what: &str) -> anyhow::Error {
    let is_v1 = what.contains(Mode::V1.group());
    let (manifest, other) =
        if is_v1 { ("operator-v1.yaml", "operator.yaml") } else { ("operator.yaml", "operator-v1.yaml") };
    anyhow::anyhow!(
        "{what}: {error}; this cluster's data is in {}, so apply deploy/{manifest} of this version, not deploy/{other}",
        if is_v1 { Mode::V1 } else { Mode::V3 }
    )
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn agents_that_run_decide_where_data_is() {
        let agents = |env: serde_json::Value| -> DaemonSet {
            let containers = json!([{ "name": NODE, "env": env }]);
            let spec = json!({ "selector": {}, "template": { "spec": { "containers": containers } } });
            serde_json::from_value(json!({ "metadata": { "name": NODE }, "spec": spec })).unwrap()
        };
        let told = json!([{ "name": STORAGE_VARIABLE, "value": "crd.projectcalico.org/v1" }]);
        assert_eq!(written_to(&agents(told)), "crd.projectcalico.org/v1");
        assert_eq!(written_to(&agents(json!([]))), "projectcalico.org/v3");
    }

    #[test]
    fn what_an_older_calico_lacks_is_made_and_nothing_else() {
        let names = |served: &[&str]| {
            let served: Vec<String> = served.iter().map(|name| (*name).to_owned()).collect();
            missing(&served).iter().map(|definition| definition.spec.names.plural.clone()).collect::<Vec<_>>()
        };
        let all = [
            "ipreservations",
            "stagedglobalnetworkpolicies",
            "stagedkubernetesnetworkpolicies",
            "stagednetworkpolicies",
            "tiers",
        ];
        assert_eq!(names(&["ippools"]), all);
        assert_eq!(names(&["ippools", "tiers", "ipreservations"]), all[1..4]);
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
