//! `diff`: which connections among pods a change would allow or deny.

use std::collections::BTreeMap;
use std::net::IpAddr;

use anyhow::{Result, ensure};
use margay_api::endpoint::EndpointKey;
use margay_api::policy::PolicyKey;
use margay_api::rule::{Action, PortRange, Protocol};
use margay_calc::evaluate::{Direction, Packet, evaluate};
use margay_calc::explain::{EndVerdict, Outcome, Place};
use margay_calc::model::{EndpointRecord, Record, RecordId, RuleRecord, SetId, TierBinding};
use serde::Serialize;

use crate::classes::{self, Class, RecordMap};
use crate::cluster::Cluster;
use crate::live::ConnectionArgs;
use crate::objects::Objects;
use crate::output::{Finding, Output};
use crate::party::protocol_name;
use crate::ports::{self, Cuts};
use crate::report::{self, OutcomeReport, RefusedReport};
use crate::source;

/// Pairs of classes that are compared at most: more take minutes.
const MAX_PAIRS: usize = 4_000_000;
/// First port of the dynamic range (RFC 6335, section 6), as a client would use.
const SOURCE_PORT: u16 = 49_152;
/// ICMP echo request: type and code.
const PING: (u8, u8) = (8, 0);
/// ICMPv6 echo request (RFC 4443, section 4.1).
const PING_V6: (u8, u8) = (128, 0);
/// Pods of a class that a line names.
const NAMED: usize = 3;

/// Arguments of the command.
#[derive(Clone, Debug, clap::Args)]
pub struct Args {
    /// File or folder of manifests that would be applied; - is standard input.
    #[arg(
        short = 'f',
        long = "filename",
        value_name = "PATH",
        required_unless_present = "staged"
    )]
    pub files: Vec<String>,
    /// Enforce the staged policies too.
    #[arg(long)]
    pub staged: bool,
    /// File or folder of manifests that is taken for the cluster as it is [default: what the API
    /// server has].
    #[arg(long, value_name = "PATH")]
    pub offline: Vec<String>,
    /// Namespace of objects without one.
    #[arg(short, long, default_value = "default")]
    pub namespace: String,
    /// Lines of the answer, at most.
    #[arg(long, default_value_t = 500)]
    pub limit: usize,
    /// Form of the answer.
    #[arg(short, long, value_enum, default_value_t)]
    pub output: Output,
    /// The cluster.
    #[command(flatten)]
    pub connection: ConnectionArgs,
}

/// What a change does.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Answer {
    /// Groups of pods that the changes refer to, by number.
    pub groups: BTreeMap<usize, Vec<String>>,
    /// The changes, in order of the groups.
    pub changes: Vec<Change>,
    /// Changes beyond the limit.
    pub omitted: usize,
    /// Objects that are not enforced as written.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub refused: Vec<RefusedReport>,
    /// What was assumed.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub notes: Vec<String>,
}

/// Connections between two groups that would have another verdict.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Change {
    /// `allow` or `deny`: the new verdict.
    pub verdict: report::VerdictName,
    /// Group of the sources.
    pub from: usize,
    /// Group of the destinations.
    pub to: usize,
    /// IP version, 4 or 6.
    pub ip: u8,
    /// What: a protocol, with ranges of ports unless it is all of them.
    pub traffic: Vec<String>,
    /// The step that decides about the first of them, afterwards.
    pub reason: String,
}

/// Runs the command.
pub fn run(args: &Args) -> Result<Finding> {
    let mut objects = source::objects(&args.offline, &args.namespace, &args.connection)?;
    let before = Cluster::of(&objects);
    objects.overlay(Objects::read(&args.files, &args.namespace)?);
    let after = if args.staged {
        Cluster::with_staged(&objects)
    } else {
        Cluster::of(&objects)
    };
    let answer = compare(&before, &after, args.limit)?;
    let text = match args.output {
        Output::Tree => show(&answer),
        Output::Json => report::json(&answer)?,
    };
    Ok(Finding {
        text,
        holds: answer.changes.is_empty() && answer.omitted == 0,
    })
}

/// Compares two states of a cluster.
pub fn compare(before: &Cluster, after: &Cluster, limit: usize) -> Result<Answer> {
    let states = [classes::records(before), classes::records(after)];
    let groups = classes::divide(&[&states[0], &states[1]]);
    let comparison = Comparison {
        states: &states,
        after,
    };
    let pairs: Vec<(usize, usize)> = comparison.pairs(&groups);
    ensure!(
        pairs.len() <= MAX_PAIRS,
        "{} pairs of different pods are affected, more than {MAX_PAIRS}; compare a part of the \
         manifests at a time",
        pairs.len()
    );
    let (mut changes, mut omitted) = (Vec::new(), 0);
    for (from, to) in pairs {
        for change in comparison.changes(&groups, from, to) {
            if changes.len() < limit {
                changes.push(change)
            } else {
                omitted += 1
            }
        }
    }
    let used = changes.iter().flat_map(|change| [change.from, change.to]);
    let groups = used
        .map(|group| {
            (
                group,
                groups[group].pods.iter().map(ToString::to_string).collect(),
            )
        })
        .collect();
    Ok(Answer {
        groups,
        changes,
        omitted,
        refused: report::refused(after),
        notes: after.notes.clone(),
    })
}

/// The two states that are compared.
struct Comparison<'a> {
    states: &'a [RecordMap; 2],
    after: &'a Cluster,
}

impl Comparison<'_> {
    /// Pairs of groups between which a verdict may differ.
    fn pairs(&self, groups: &[Class]) -> Vec<(usize, usize)> {
        let affected = |is_ingress: bool| -> Vec<bool> {
            groups
                .iter()
                .map(|group| self.is_affected(group, is_ingress))
                .collect()
        };
        let (egress, ingress) = (affected(false), affected(true));
        let pairs = (0..groups.len()).flat_map(|from| (0..groups.len()).map(move |to| (from, to)));
        let is_itself = |from: usize, to: usize| from == to && groups[from].pods.len() == 1;
        pairs
            .filter(|(from, to)| (egress[*from] || ingress[*to]) && !is_itself(*from, *to))
            .collect()
    }

    /// Returns true if anything that decides about the group's packets in that direction differs.
    fn is_affected(&self, group: &Class, is_ingress: bool) -> bool {
        let [before, after] = self.states.each_ref().map(|state| endpoint(state, group));
        let (Some(before), Some(after)) = (before, after) else {
            return false;
        };
        let is_same = |id: &RecordId| self.states[0].get(id) == self.states[1].get(id);
        let list = |tiers: &[TierBinding]| -> Vec<_> {
            let tiers = tiers
                .iter()
                .filter(|tier| !policies(tier, is_ingress).is_empty());
            tiers
                .map(|tier| {
                    (
                        tier.name.clone(),
                        tier.default_action,
                        policies(tier, is_ingress).to_vec(),
                    )
                })
                .collect()
        };
        if before.unmatched != after.unmatched || list(&before.tiers) != list(&after.tiers) {
            return true;
        }
        let bound = after
            .tiers
            .iter()
            .flat_map(|tier| policies(tier, is_ingress));
        bound.map(|key| RecordId::Policy(key.clone())).any(|id| {
            let sets = self.rules(1, &id, is_ingress).iter().flat_map(sets_of);
            !is_same(&id) || sets.cloned().map(RecordId::IpSet).any(|set| !is_same(&set))
        })
    }

    fn rules(&self, state: usize, id: &RecordId, is_ingress: bool) -> &[RuleRecord] {
        match self.states[state].get(id) {
            Some(Record::Policy(policy)) => ports::rules(policy, is_ingress),
            _ => &[],
        }
    }

    /// What differs between two groups.
    fn changes(&self, groups: &[Class], from: usize, to: usize) -> Vec<Change> {
        let destination = if from == to {
            groups[to].pods.get(1)
        } else {
            groups[to].pods.first()
        };
        let Some(destination) = destination else {
            return Vec::new();
        };
        let pods = [groups[from].first(), destination];
        let mut changes = Vec::new();
        for is_ipv4 in [true, false] {
            let packets = self
                .states
                .each_ref()
                .map(|state| addresses(state, pods, is_ipv4));
            let [Some(before), Some(after)] = packets else {
                continue;
            };
            let mut found: BTreeMap<report::VerdictName, (Vec<String>, String)> = BTreeMap::new();
            for protocol in [
                Protocol::TCP,
                Protocol::UDP,
                Protocol::SCTP,
                if is_ipv4 {
                    Protocol::ICMP
                } else {
                    Protocol::ICMPV6
                },
            ] {
                self.compare_protocol(pods, [before, after], protocol, &mut found);
            }
            let ip = if is_ipv4 { 4 } else { 6 };
            changes.extend(
                found
                    .into_iter()
                    .map(|(verdict, (traffic, reason))| Change {
                        verdict,
                        from,
                        to,
                        ip,
                        traffic,
                        reason,
                    }),
            );
        }
        changes
    }

    /// Adds the ports of a protocol whose verdict differs, by the new verdict.
    fn compare_protocol(
        &self,
        pods: [&EndpointKey; 2],
        ends: [(IpAddr, IpAddr); 2],
        protocol: Protocol,
        found: &mut BTreeMap<report::VerdictName, (Vec<String>, String)>,
    ) {
        let mut differing: BTreeMap<report::VerdictName, Vec<PortRange>> = BTreeMap::new();
        for range in self.ranges(pods, ends, protocol) {
            let [before, after] =
                [0, 1].map(|state| self.outcome(state, pods, ends[state], protocol, range.first));
            if before.is_allowed == after.is_allowed {
                continue;
            }
            let verdict = report::VerdictName::of(after.is_allowed);
            differing.entry(verdict).or_default().push(range);
            found.entry(verdict).or_insert_with(|| {
                // Who denied before is what a reader wants to know of what is allowed now.
                let report = OutcomeReport::of(self.after, &self.states[1], &after);
                (Vec::new(), report.reason())
            });
        }
        for (verdict, ranges) in differing {
            if let Some((traffic, _)) = found.get_mut(&verdict) {
                traffic.push(traffic_text(protocol, &ports::join(&ranges)));
            }
        }
    }

    /// Ranges of ports that the policies of both ends tell apart, in either state.
    fn ranges(
        &self,
        pods: [&EndpointKey; 2],
        ends: [(IpAddr, IpAddr); 2],
        protocol: Protocol,
    ) -> Vec<PortRange> {
        let mut cuts = Cuts::default();
        if !protocol.has_ports() {
            return vec![PortRange {
                first: 1,
                last: u16::MAX,
            }];
        }
        for (state, records) in self.states.iter().enumerate() {
            for (pod, is_ingress) in [(pods[0], false), (pods[1], true)] {
                let Some(Record::Endpoint(endpoint)) =
                    records.get(&RecordId::Endpoint(pod.clone()))
                else {
                    continue;
                };
                for key in endpoint
                    .tiers
                    .iter()
                    .flat_map(|tier| policies(tier, is_ingress))
                {
                    let rules = self.rules(state, &RecordId::Policy(key.clone()), is_ingress);
                    cuts.add_rules(records, rules, protocol, &[ends[state].1]);
                }
            }
        }
        cuts.ranges()
    }

    fn outcome(
        &self,
        state: usize,
        [from, to]: [&EndpointKey; 2],
        (source, destination): (IpAddr, IpAddr),
        protocol: Protocol,
        port: u16,
    ) -> Outcome {
        let icmp = if source.is_ipv4() { PING } else { PING_V6 };
        let packet = Packet {
            source,
            destination,
            protocol,
            source_port: SOURCE_PORT,
            destination_port: port,
            icmp,
        };
        let ends = [(from, Direction::Egress), (to, Direction::Ingress)].map(|(pod, direction)| {
            let verdict = evaluate(&self.states[state], pod, direction, &packet);
            EndVerdict {
                direction,
                place: Place::Pod(pod.clone(), verdict),
            }
        });
        let is_allowed = ends.iter().all(
            |end| matches!(&end.place, Place::Pod(_, verdict) if verdict.action == Action::Allow),
        );
        Outcome {
            is_allowed,
            ends: ends.into(),
        }
    }
}

fn endpoint<'a>(state: &'a RecordMap, group: &Class) -> Option<&'a EndpointRecord> {
    match state.get(&RecordId::Endpoint(group.first().clone())) {
        Some(Record::Endpoint(endpoint)) => Some(endpoint),
        _ => None,
    }
}

fn policies(tier: &TierBinding, is_ingress: bool) -> &[PolicyKey] {
    if is_ingress {
        &tier.ingress
    } else {
        &tier.egress
    }
}

/// Sets that a rule names.
fn sets_of(rule: &RuleRecord) -> impl Iterator<Item = &SetId> {
    [&rule.source, &rule.destination]
        .into_iter()
        .flat_map(|side| {
            let plain = side.sets.iter().chain(&side.not_sets);
            plain
                .chain(side.port_sets.iter())
                .chain(&side.not_port_sets)
                .chain(&side.service_set)
        })
}

/// First addresses of both pods of an IP version.
fn addresses(
    state: &RecordMap,
    pods: [&EndpointKey; 2],
    is_ipv4: bool,
) -> Option<(IpAddr, IpAddr)> {
    let address = |pod: &EndpointKey| match state.get(&RecordId::Endpoint(pod.clone())) {
        Some(Record::Endpoint(endpoint)) => endpoint
            .addresses
            .iter()
            .copied()
            .find(|address| address.is_ipv4() == is_ipv4),
        _ => None,
    };
    Some((address(pods[0])?, address(pods[1])?))
}

/// A protocol with its ports, unless it is all of them.
fn traffic_text(protocol: Protocol, ranges: &[PortRange]) -> String {
    let name = protocol_name(protocol);
    if ranges
        == [PortRange {
            first: 1,
            last: u16::MAX,
        }]
    {
        return name;
    }
    let ranges = ranges.iter().map(|range| match range.first == range.last {
        true => range.first.to_string(),
        false => format!("{}-{}", range.first, range.last),
    });
    format!("{name} {}", ranges.collect::<Vec<_>>().join(","))
}

fn show(answer: &Answer) -> String {
    let mut text = String::new();
    let name = |group: usize| {
        let pods = answer
            .groups
            .get(&group)
            .map(Vec::as_slice)
            .unwrap_or_default();
        let shown = pods
            .iter()
            .take(NAMED)
            .map(String::as_str)
            .collect::<Vec<_>>()
            .join(", ");
        match pods.len().saturating_sub(NAMED) {
            0 => shown,
            more => format!("{shown} and {more} more"),
        }
    };
    for Change {
        verdict,
        from,
        to,
        ip,
        traffic,
        reason,
    } in &answer.changes
    {
        let version = if *ip == 6 { " over IPv6" } else { "" };
        let (from, to, traffic) = (name(*from), name(*to), traffic.join("; "));
        text += &format!(
            "newly {}: {from} to {to}{version}: {traffic}\n    {reason}\n",
            verdict.word()
        );
    }
    if answer.changes.is_empty() {
        text += "no connection among these pods would have another verdict\n";
    }
    if answer.omitted > 0 {
        text += &format!("and {} more; --limit shows them\n", answer.omitted);
    }
    report::write_remarks(&answer.refused, &answer.notes, &mut text);
    text
}
