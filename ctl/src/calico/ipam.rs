//! `ipam`: how addresses are used, what does not fit together, and what may be released.

use std::collections::BTreeMap;
use std::net::IpAddr;
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use clap::{ArgAction, Subcommand};
use ipnet::IpNet;
use k8s_openapi::api::core::v1::Pod;
use margay_api::ipam::block::Block;
use margay_api::storage::{Kind, Mode, kind};
use margay_api::v3::ipam::{AllocationAttribute, BlockAffinity, IPAMBlock, IPAMHandle};
use margay_ipam::check;
use margay_ipam::collector;
use margay_ipam::leak_scan::{self, IpamState, LeakCandidates, Release, ScanRules};
use margay_ipam::release::release_address;
use margay_ipam::store::api_server::{ApiServer, pod_facts};
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

use crate::calico::table::framed;
use crate::calico::{split, usage};
use crate::live::{self, Connection, ConnectionArgs};
use crate::manifest;
use crate::output::Finding;

/// Calico's kinds that the state is read from, handles before blocks as [`IpamState`] asks for.
const KINDS: [&str; 6] = [
    "IPAMHandle",
    "IPAMBlock",
    "BlockAffinity",
    "IPPool",
    "IPReservation",
    "IPAMConfiguration",
];
/// Longer than every grace period: what has no owner now is shown, however new it is.
const LATER: Duration = Duration::from_secs(365 * 24 * 3600);

/// A command about addresses.
#[derive(Clone, Debug, Subcommand)]
pub enum Command {
    /// Shows how many addresses are in use, or what one is used for.
    Show(ShowArgs),
    /// Says what does not fit together, and which addresses have no owner any more.
    Check(CheckArgs),
    /// Releases an address, or those that a report of check lists.
    Release(ReleaseArgs),
    /// Changes settings of address management.
    Configure(ConfigureArgs),
    /// Makes several smaller pools of one.
    Split(split::Args),
}

/// Where the state is read from.
#[derive(Clone, Debug, Default, clap::Args)]
pub struct SourceArgs {
    /// File or folder with the objects of a cluster [default: what the API server has].
    #[arg(long, value_name = "PATH")]
    pub offline: Vec<String>,
    /// The cluster.
    #[command(flatten)]
    pub connection: ConnectionArgs,
}

/// Arguments of `ipam show`.
#[derive(Clone, Debug, clap::Args)]
pub struct ShowArgs {
    /// Show what this address is used for.
    #[arg(long, value_name = "IP")]
    pub ip: Option<IpAddr>,
    /// Show each block too.
    #[arg(long)]
    pub show_blocks: bool,
    /// Show addresses that nodes have borrowed from blocks of others.
    #[arg(long)]
    pub show_borrowed: bool,
    /// Show the settings.
    #[arg(long)]
    pub show_configuration: bool,
    /// Where to read from.
    #[command(flatten)]
    pub source: SourceArgs,
}

/// Arguments of `ipam check`.
#[derive(Clone, Debug, clap::Args)]
pub struct CheckArgs {
    /// List every allocation too.
    #[arg(long)]
    pub show_all_ips: bool,
    /// Write what may be released into this file, for release --from-report.
    #[arg(short, long, value_name = "FILE")]
    pub output: Option<std::path::PathBuf>,
    /// Where to read from.
    #[command(flatten)]
    pub source: SourceArgs,
}

/// Arguments of `ipam release`.
#[derive(Clone, Debug, clap::Args)]
pub struct ReleaseArgs {
    /// The address.
    #[arg(long, value_name = "IP", required_unless_present = "from_report")]
    pub ip: Option<IpAddr>,
    /// Reports of ipam check.
    #[arg(long, value_name = "FILE", conflicts_with = "ip")]
    pub from_report: Vec<std::path::PathBuf>,
    /// Release it although it has an owner.
    #[arg(long)]
    pub force: bool,
    /// The cluster.
    #[command(flatten)]
    pub connection: ConnectionArgs,
}

/// Arguments of `ipam configure`.
#[derive(Clone, Debug, clap::Args)]
pub struct ConfigureArgs {
    /// Nodes use addresses of their own blocks only.
    #[arg(long, action = ArgAction::Set, value_name = "true|false")]
    pub strictaffinity: Option<bool>,
    /// Blocks that a node may have; 0: any number.
    #[arg(long, value_name = "NUMBER")]
    pub max_blocks_per_host: Option<u32>,
    /// Seconds for which a released address rests.
    #[arg(long, value_name = "SECONDS")]
    pub ip_cooldown_seconds: Option<u32>,
    /// The cluster.
    #[command(flatten)]
    pub connection: ConnectionArgs,
}

/// An allocation that may be released.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Leak {
    /// Block of the address.
    pub block: IpNet,
    /// The address.
    pub address: IpAddr,
    /// Tells this allocation from later ones.
    pub sequence: Option<u64>,
    /// Its handle.
    pub handle: String,
    /// Pod that it was for, if it was for one.
    pub pod: Option<String>,
}

/// State of address management.
#[derive(Debug, Default)]
pub struct IpamData {
    /// Blocks, affinities, handles, and who may need them.
    pub state: IpamState,
    /// Ranges of the pools by name.
    pub pools: BTreeMap<String, IpNet>,
    /// Ranges that nothing is assigned from.
    pub reserved: Vec<IpNet>,
    /// Settings: the spec of the IPAMConfiguration.
    pub configuration: Value,
}

impl IpamData {
    /// Adds an object in the users' form; other kinds are left out.
    pub fn add(&mut self, object: Value) -> Result<()> {
        let text = |field: &str| {
            object["metadata"][field]
                .as_str()
                .unwrap_or_default()
                .to_owned()
        };
        let (name, kind) = (
            text("name"),
            object["kind"].as_str().unwrap_or_default().to_owned(),
        );
        let context = || format!("{kind} {name}: not what its kind is");
        match kind.as_str() {
            "IPAMBlock" => {
                let block: IPAMBlock = serde_json::from_value(object).with_context(context)?;
                self.state.blocks.push(Block::parse(block.spec)?);
            }
            "BlockAffinity" => {
                let object: BlockAffinity = serde_json::from_value(object).with_context(context)?;
                self.state.affinities.extend(collector::affinity(object));
            }
            "IPAMHandle" => {
                let object: IPAMHandle = serde_json::from_value(object).with_context(context)?;
                self.state.handles.push(collector::handle(object));
            }
            "IPPool" => {
                let cidr = object["spec"]["cidr"].as_str().unwrap_or_default();
                let range = cidr
                    .parse()
                    .with_context(|| format!("IPPool {name}: {cidr:?}"))?;
                self.state.pools.get_or_insert_default().push(range);
                self.pools.insert(name, range);
            }
            "IPReservation" => {
                let ranges = object["spec"]["reservedCIDRs"]
                    .as_array()
                    .into_iter()
                    .flatten();
                let ranges =
                    ranges.filter_map(|range| margay_api::network::parse_net(range.as_str()?));
                self.reserved.extend(ranges);
            }
            "IPAMConfiguration" => self.configuration = object["spec"].clone(),
            "Node" => {
                self.state.nodes.insert(name);
            }
            "Pod" => {
                let pod: Pod = serde_json::from_value(object).with_context(context)?;
                self.state.pods.extend([pod_facts(&pod)]);
            }
            _ => {}
        }
        Ok(())
    }

    /// Reads the state of a cluster.
    pub async fn read(cluster: &Connection) -> Result<Self> {
        let mut data = Self::default();
        for kind in KINDS.iter().filter_map(|kind| Kind::of(kind)) {
            for object in cluster.list_calico(kind, None).await? {
                data.add(object)?;
            }
        }
        for (kind, plural) in [("Pod", "pods"), ("Node", "nodes")] {
            for object in cluster
                .list(&live::resource("", "v1", kind, plural), None)
                .await?
            {
                data.add(object)?;
            }
        }
        Ok(data)
    }

    /// Reads the state out of files.
    pub fn read_files(paths: &[String]) -> Result<Self> {
        let (mut data, mut errors) = (Self::default(), Vec::new());
        for path in paths {
            manifest::read(path, &mut |document| {
                let added = match document {
                    Ok((origin, value)) => {
                        data.add_document(value).with_context(|| origin.to_string())
                    }
                    Err(bad) => Err(anyhow::anyhow!("{}: {}", bad.origin, bad.reason)),
                };
                errors.extend(added.err().map(|error| format!("{error:#}")));
            })?;
        }
        ensure!(errors.is_empty(), "{}", errors.join("\n"));
        Ok(data)
    }

    fn add_document(&mut self, mut value: Value) -> Result<()> {
        if let Some(Value::Array(items)) = value.get_mut("items") {
            return std::mem::take(items)
                .into_iter()
                .try_for_each(|item| self.add_document(item));
        }
        let is_stored = value["apiVersion"] == Mode::V1.api_version().as_str();
        let stored = kind::ALL
            .iter()
            .find(|kind| value["kind"] == kind.stored_kind);
        match stored.filter(|_| is_stored) {
            Some(kind) => self.add(live::from_storage(Mode::V1, kind, value)?),
            None => self.add(value),
        }
    }

    /// Allocations without an owner. Nothing is found while no node is known, as the state is not
    /// complete then.
    pub fn leaks(&self) -> Vec<Leak> {
        let rules = ScanRules {
            leak: Some(Duration::ZERO),
            ..ScanRules::default()
        };
        let mut candidates = LeakCandidates::default();
        leak_scan::plan(&self.state, rules, &mut candidates, Duration::ZERO);
        let plan = leak_scan::plan(&self.state, rules, &mut candidates, LATER);
        let leak = |(block, release): (IpNet, Release)| Leak {
            block,
            address: release.address,
            sequence: release.sequence,
            handle: release.handle,
            pod: release.pod,
        };
        let releases = plan.releases.into_iter();
        let releases =
            releases.flat_map(|(block, list)| list.into_iter().map(move |one| (block, one)));
        // An address that rests has had its owner release it.
        releases
            .filter(|(_, release)| !release.handle.is_empty())
            .map(leak)
            .collect()
    }

    /// The block of an address, and its allocation if it has one.
    fn allocation(&self, address: IpAddr) -> Option<(&Block, Option<&AllocationAttribute>)> {
        let mut blocks = self
            .state
            .blocks
            .iter()
            .filter(|block| block.cidr().contains(&address));
        let block = blocks.next()?;
        let found = block.allocated().find(|(known, _)| *known == address);
        Some((block, found.map(|(_, attribute)| attribute)))
    }
}

/// Runs a command.
pub fn run(command: &Command) -> Result<Finding> {
    match command {
        Command::Show(args) => Ok(Finding {
            text: show(&read(&args.source)?, args),
            holds: true,
        }),
        Command::Check(args) => run_check(args),
        Command::Release(args) => live::block_on(release(args)),
        Command::Configure(args) => live::block_on(configure(args)),
        Command::Split(args) => live::block_on(split::run(args)),
    }
}

fn read(source: &SourceArgs) -> Result<IpamData> {
    match source.offline.as_slice() {
        [] => live::block_on(async {
            IpamData::read(&Connection::open(&source.connection).await?).await
        }),
        paths => IpamData::read_files(paths),
    }
}

fn show(data: &IpamData, args: &ShowArgs) -> String {
    if let Some(address) = args.ip {
        return show_address(data, address);
    }
    if args.show_configuration {
        let fields = data.configuration.as_object().into_iter().flatten();
        let rows: Vec<_> = fields
            .map(|(name, value)| vec![name.clone(), value.to_string()])
            .collect();
        return framed(&["PROPERTY", "VALUE"], &rows, 2);
    }
    if args.show_borrowed {
        return usage::borrowed(&data.state.blocks);
    }
    usage::utilisation(
        &data.pools,
        &data.reserved,
        &data.state.blocks,
        args.show_blocks,
    )
}

fn show_address(data: &IpamData, address: IpAddr) -> String {
    let Some((_, Some(attribute))) = data.allocation(address) else {
        return format!("{address} is not assigned\n");
    };
    let handle = attribute.handle_id.as_deref().unwrap_or("<none>");
    let mut text = format!("IP {address} is in use\nHandle ID: {handle}\n");
    match &attribute.secondary {
        Some(owner) => {
            text += "Active Owner Attributes:\n";
            owner
                .iter()
                .for_each(|(key, value)| text += &format!("  {key}: {value}\n"));
        }
        None => text += "No Active Owner attributes defined\n",
    }
    if let Some(released) = &attribute.released_at {
        text += &format!("Released at: {released}\n");
    }
    text
}

fn run_check(args: &CheckArgs) -> Result<Finding> {
    let data = read(&args.source)?;
    let leaks = data.leaks();
    if let Some(path) = &args.output {
        let report = serde_json::to_string_pretty(&json!({"leaks": leaks}))?;
        std::fs::write(path, report)
            .with_context(|| format!("{}: cannot be written", path.display()))?;
    }
    let (text, problems) = checked(&data, &leaks, args.show_all_ips);
    Ok(Finding {
        text,
        holds: problems == 0,
    })
}

/// The result of a check as text, and the number of problems.
fn checked(data: &IpamData, leaks: &[Leak], shows_all: bool) -> (String, usize) {
    let IpamState {
        blocks,
        handles,
        nodes,
        pods,
        ..
    } = &data.state;
    let allocated: usize = blocks.iter().map(|block| block.allocated().count()).sum();
    let mut text = format!(
        "{} pools, {} blocks with {allocated} addresses in use, {} handles, {} nodes, {} pods\n",
        data.pools.len(),
        blocks.len(),
        handles.len(),
        nodes.len(),
        pods.len()
    );
    if shows_all {
        for (address, attribute) in blocks.iter().flat_map(Block::allocated) {
            text += &format!("{address} {}\n", usage::owner(attribute));
        }
    }
    let overlaps = check::overlaps(blocks);
    let inconsistencies = check::inconsistencies(&data.state);
    let leaked = leaks.iter().map(|leak| {
        let owner = leak
            .pod
            .as_deref()
            .map_or_else(|| leak.handle.clone(), |pod| format!("pod {pod}"));
        format!("address {} of {owner} has no owner any more", leak.address)
    });
    let problems: Vec<String> = overlaps
        .into_iter()
        .chain(inconsistencies)
        .chain(leaked)
        .collect();
    problems
        .iter()
        .for_each(|problem| text += &format!("problem: {problem}\n"));
    text += &format!("Check complete; found {} problems.\n", problems.len());
    (text, problems.len())
}

async fn release(args: &ReleaseArgs) -> Result<Finding> {
    let cluster = Connection::open(&args.connection).await?;
    let data = IpamData::read(&cluster).await?;
    let wanted = match args.ip {
        Some(address) => vec![to_release(&data, address, args.force)?],
        None => reported(&args.from_report, &data, args.force)?,
    };
    let store = ApiServer::new(cluster.client().clone(), cluster.mode());
    let mut text = String::new();
    for Leak {
        block,
        address,
        sequence,
        ..
    } in wanted
    {
        let done = release_address(&store, block, address, sequence).await;
        let is_released = done.with_context(|| format!("{address}: cannot be released"))?;
        text += &match is_released {
            true => format!("{address}: released\n"),
            false => format!("{address}: left as it is, because it has been assigned anew\n"),
        };
    }
    Ok(Finding { text, holds: true })
}

/// The allocation of an address, if it may be released.
fn to_release(data: &IpamData, address: IpAddr, is_forced: bool) -> Result<Leak> {
    let Some((block, Some(attribute))) = data.allocation(address) else {
        bail!("--ip: {address} is not assigned");
    };
    let leaks = data.leaks();
    if !is_forced && !leaks.iter().any(|leak| leak.address == address) {
        bail!(
            "--ip: {address} is in use by {}; another one would get it too. Delete its \
             owner, or use --force",
            usage::owner(attribute)
        );
    }
    let handle = attribute.handle_id.clone().unwrap_or_default();
    let sequence = block.sequence(address);
    Ok(Leak {
        block: block.cidr(),
        address,
        sequence,
        handle,
        pod: None,
    })
}

/// Allocations of reports that still have no owner.
fn reported(paths: &[std::path::PathBuf], data: &IpamData, is_forced: bool) -> Result<Vec<Leak>> {
    #[derive(Deserialize)]
    struct Report {
        leaks: Vec<Leak>,
    }
    let (leaks, mut wanted) = (data.leaks(), Vec::new());
    for path in paths {
        let shown = path.display();
        let text =
            std::fs::read_to_string(path).with_context(|| format!("{shown}: cannot be read"))?;
        let report: Report = serde_json::from_str(&text)
            .with_context(|| format!("{shown}: not a report of ipam check -o"))?;
        wanted.extend(
            report
                .leaks
                .into_iter()
                .filter(|leak| is_forced || leaks.contains(leak)),
        );
    }
    Ok(wanted)
}

async fn configure(args: &ConfigureArgs) -> Result<Finding> {
    let wanted = settings(args)?;
    let kind =
        Kind::of("IPAMConfiguration").context("IPAMConfiguration is one of Calico's kinds")?;
    let cluster = Connection::open(&args.connection).await?;
    match cluster.find(kind, None, "default").await? {
        Some(found) => {
            let mut object = found.object.clone();
            for (field, value) in wanted {
                object["spec"][field] = value;
            }
            cluster.replace(kind, &found, object).await?;
        }
        None => {
            let spec: serde_json::Map<String, Value> = wanted
                .into_iter()
                .map(|(field, value)| (field.to_owned(), value))
                .collect();
            let object = json!({
                "apiVersion": "projectcalico.org/v3", "kind": kind.kind,
                "metadata": {"name": "default"}, "spec": spec,
            });
            cluster.create(kind, object).await?;
        }
    }
    Ok(Finding {
        text: "Successfully set the settings of address management\n".to_owned(),
        holds: true,
    })
}

/// Fields that are asked for, with their values.
fn settings(args: &ConfigureArgs) -> Result<Vec<(&'static str, Value)>> {
    let fields = [
        ("strictAffinity", args.strictaffinity.map(Value::from)),
        (
            "maxBlocksPerHost",
            args.max_blocks_per_host.map(Value::from),
        ),
        (
            "ipCooldownSeconds",
            args.ip_cooldown_seconds.map(Value::from),
        ),
    ];
    let wanted: Vec<_> = fields
        .into_iter()
        .filter_map(|(field, value)| Some((field, value?)))
        .collect();
    ensure!(
        !wanted.is_empty(),
        "nothing to set; give --strictaffinity, --max-blocks-per-host or --ip-cooldown-seconds"
    );
    Ok(wanted)
}

#[cfg(test)]
#[path = "ipam_tests.rs"]
mod tests;
