//! `ipam split`: one pool becomes several smaller ones, without an address in use losing its pool.

use anyhow::{Context, Result, bail, ensure};
use ipnet::IpNet;
use kube::Api;
use kube::api::{DeleteParams, DynamicObject, Patch, PatchParams};
use margay_api::storage::Kind;
use serde_json::{Value, json};

use crate::live::{Connection, ConnectionArgs, Found, explained};
use crate::output::Finding;

/// Prefix length of blocks of a pool that names none, for IPv4 and IPv6 (Calico).
const BLOCK_SIZES: (u8, u8) = (26, 122);
/// Label of pools that the operator keeps as the Installation has them.
const MANAGED: (&str, &str) = ("app.kubernetes.io/managed-by", "margay-operator");
/// Pools that one is split into, at most.
const MAX_PARTS: u32 = 1 << 16;

/// Arguments of the command.
#[derive(Clone, Debug, clap::Args)]
pub struct Args {
    /// Number of pools to make of it, a power of two.
    pub number: u32,
    /// Name of the pool.
    #[arg(long, value_name = "NAME", required_unless_present = "cidr")]
    pub name: Option<String>,
    /// Range of the pool.
    #[arg(long, value_name = "CIDR", conflicts_with = "name")]
    pub cidr: Option<IpNet>,
    /// The cluster.
    #[command(flatten)]
    pub connection: ConnectionArgs,
}

/// Runs the command.
pub async fn run(args: &Args) -> Result<Finding> {
    let (pools, information) = (kind("IPPool")?, kind("ClusterInformation")?);
    let cluster = Connection::open(&args.connection).await?;
    let data = cluster.find(information, None, "default").await?;
    let is_locked = data.is_some_and(|data| data.object["spec"]["datastoreReady"] == false);
    ensure!(
        is_locked,
        "the data is not locked, so that new pods may get addresses meanwhile; run `datastore \
         migrate lock` before, and `datastore migrate unlock` afterwards"
    );
    let name = match (&args.name, args.cidr) {
        (Some(name), _) => name.clone(),
        (None, Some(range)) => named(&cluster.list_calico(pools, None).await?, range)?,
        (None, None) => bail!("give --name or --cidr of the pool"),
    };
    let found = cluster.find(pools, None, &name).await?;
    let found = found.with_context(|| format!("there is no IPPool {name}"))?;
    let parts = parts(&found.object, args.number)?;
    // The parts come first: a block always lies in a pool, so that it keeps its route.
    for part in &parts {
        let part_name = part["metadata"]["name"].as_str().unwrap_or_default();
        match cluster.find(pools, None, part_name).await? {
            Some(there) => ensure!(
                there.object["spec"]["cidr"] == part["spec"]["cidr"],
                "IPPool {part_name}: there is another one of that name; rename it"
            ),
            None => cluster.create(pools, part.clone()).await?,
        }
    }
    remove(&cluster, pools, &found).await?;
    let range = found.object["spec"]["cidr"].as_str().unwrap_or_default();
    let mut text = format!("IPPool {name} ({range}) is now {} pools:\n", parts.len());
    for part in &parts {
        let field = |path: &str| {
            part.pointer(path)
                .and_then(Value::as_str)
                .unwrap_or_default()
        };
        text += &format!("{} ({})\n", field("/metadata/name"), field("/spec/cidr"));
    }
    Ok(Finding { text, holds: true })
}

/// Deletes a pool although it has blocks. Its finalizers keep it for their sake; they are in its
/// parts.
async fn remove(cluster: &Connection, pools: &Kind, found: &Found) -> Result<()> {
    let api: Api<DynamicObject> =
        Api::all_with(cluster.client().clone(), &pools.resource(cluster.mode()));
    let name = &found.stored_name;
    // Its version is no condition: the operator writes its status at the same time.
    match api.delete(name, &DeleteParams::default()).await {
        Err(kube::Error::Api(status)) if status.code == 404 => return Ok(()),
        deleted => drop(deleted.map_err(explained)?),
    }
    // Finalizers cannot be added from here on.
    let none = Patch::Merge(json!({"metadata": {"finalizers": null}}));
    match api.patch(name, &PatchParams::default(), &none).await {
        Err(kube::Error::Api(status)) if status.code == 404 => Ok(()),
        patched => patched.map(drop).map_err(explained),
    }
}

fn kind(name: &str) -> Result<&'static Kind> {
    Kind::of(name).with_context(|| format!("{name} is one of Calico's kinds"))
}

/// Name of the pool of that range.
fn named(pools: &[Value], range: IpNet) -> Result<String> {
    let is_it = |pool: &&Value| {
        pool["spec"]["cidr"]
            .as_str()
            .and_then(|cidr| cidr.parse().ok())
            == Some(range)
    };
    let found = pools
        .iter()
        .find(is_it)
        .and_then(|pool| pool["metadata"]["name"].as_str());
    found
        .map(str::to_owned)
        .with_context(|| format!("--cidr: no IPPool has the range {range}"))
}

/// The pools that take the place of one: as it is, with a part of its range each.
fn parts(pool: &Value, number: u32) -> Result<Vec<Value>> {
    ensure!(
        number.is_power_of_two() && (2..=MAX_PARTS).contains(&number),
        "{number}: must be a power of two from 2 to {MAX_PARTS}, so that the parts are ranges"
    );
    let name = pool["metadata"]["name"].as_str().unwrap_or_default();
    let cidr = pool["spec"]["cidr"].as_str().unwrap_or_default();
    let range: IpNet = cidr
        .parse()
        .with_context(|| format!("IPPool {name}: {cidr:?}"))?;
    let (label, operator) = MANAGED;
    ensure!(
        pool["metadata"]["labels"][label] != operator,
        "IPPool {name} belongs to the Installation; take it out of \
         spec.calicoNetwork.ipPools and remove its label {label} before"
    );
    let usual = match range {
        IpNet::V4(_) => BLOCK_SIZES.0,
        IpNet::V6(_) => BLOCK_SIZES.1,
    };
    let block = pool["spec"]["blockSize"]
        .as_u64()
        .unwrap_or(u64::from(usual));
    let length = range.prefix_len() + number.trailing_zeros() as u8;
    ensure!(
        u64::from(length) <= block,
        "{number}: parts of {range} would be smaller than its blocks, which are /{block}; make \
         fewer parts"
    );
    let part = |(index, range): (usize, IpNet)| {
        let mut metadata = json!({"name": format!("split-{name}-{index}")});
        for field in ["labels", "annotations"] {
            let value = &pool["metadata"][field];
            if !value.is_null() {
                metadata[field] = value.clone();
            }
        }
        let mut spec = pool["spec"].clone();
        spec["cidr"] = range.to_string().into();
        json!({
            "apiVersion": pool["apiVersion"], "kind": pool["kind"],
            "metadata": metadata, "spec": spec,
        })
    };
    Ok(range.subnets(length)?.enumerate().map(part).collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn pool() -> Value {
        json!({
            "apiVersion": "projectcalico.org/v3", "kind": "IPPool",
            "metadata": {
                "name": "a", "labels": {"team": "red"}, "uid": "u", "finalizers": ["f"],
            },
            "spec": {"cidr": "10.0.0.0/16", "natOutgoing": true, "blockSize": 26},
            "status": {"conditions": []},
        })
    }

    #[test]
    fn parts_are_the_pool_with_smaller_ranges() {
        let parts = parts(&pool(), 4).expect("four parts");
        let ranges: Vec<_> = parts
            .iter()
            .map(|part| part["spec"]["cidr"].clone())
            .collect();
        assert_eq!(
            ranges,
            [
                "10.0.0.0/18",
                "10.0.64.0/18",
                "10.0.128.0/18",
                "10.0.192.0/18"
            ]
        );
        assert_eq!(
            parts[3]["metadata"],
            json!({"name": "split-a-3", "labels": {"team": "red"}})
        );
        assert_eq!(parts[0]["spec"]["natOutgoing"], true);
        assert!(parts[0]["status"].is_null());
    }

    #[test]
    fn what_cannot_be_split_is_refused_with_a_reason() {
        let error = |pool: &Value, number| parts(pool, number).expect_err("refused").to_string();
        assert!(error(&pool(), 3).contains("power of two"));
        assert!(error(&pool(), 1).contains("power of two"));
        assert!(error(&pool(), 2048).contains("smaller than its blocks"));
        let mut managed = pool();
        managed["metadata"]["labels"] = json!({MANAGED.0: MANAGED.1});
        assert!(error(&managed, 2).contains("belongs to the Installation"));
        let range = "10.0.0.0/16".parse().expect("a range");
        assert_eq!(named(&[pool()], range).expect("found"), "a");
        assert!(named(&[pool()], "10.1.0.0/16".parse().expect("a range")).is_err());
    }
}
