//! Routing as the owner sees it: where plans go, how far the kernel has come, and what failures
//! mean for records and for the node.

use std::collections::BTreeMap;
use std::fmt::Write;
use std::time::{Duration, Instant};

use margay_api::network::TunnelKind;
use margay_calc::model::{Record, RecordId, globals};
use tokio::sync::watch;

use super::Routes;
use margay_dataplane::routes::driver::RoutingPart;
use margay_dataplane::routes::plan::{LocalPods, Plan};
use margay_dataplane::routes::worker::Progress;

/// Grace period before failed routing counts against the node: links go down and come back.
const GRACE: Duration = Duration::from_secs(5);
/// Maximal number of records reported with routing errors; the rest is only mentioned.
const MAX_ERRORS: usize = 128;
/// Maximal number of failed parts named in one reason.
const MAX_NAMED: usize = 3;

/// Routing that has failed for longer than the grace period.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RoutingFault {
    /// The failed parts with the kernel's reasons.
    pub reason: String,
    /// Whether it concerns the node itself (its tunnel devices, forwarding or netlink), so that no
    /// pod here has a network. What concerns the path to one other node does not count: by what it
    /// says of itself, a node must not be able to take another one out of service.
    pub is_own: bool,
}

/// State of routing in the owner.
#[derive(Default)]
pub(super) struct Routing {
    routes: Option<(Box<dyn Routes>, watch::Receiver<Progress>)>,
    /// Generation of the newest plan.
    generation: u64,
    /// Records that the plan leaves out, with the reason.
    unreachable: BTreeMap<RecordId, String>,
    /// Records that are not in force as written, as of the progress seen last.
    errors: BTreeMap<RecordId, String>,
    /// `errors` must be computed again.
    is_stale: bool,
    failing_since: Option<Instant>,
}

impl Routing {
    pub(super) fn new(routes: Option<Box<dyn Routes>>) -> Self {
        let routes = routes.map(|routes| {
            let progress = routes.progress();
            (routes, progress)
        });
        Self {
            routes,
            ..Self::default()
        }
    }

    /// Generation of the newest plan.
    pub(super) const fn generation(&self) -> u64 {
        self.generation
    }

    /// Generation of the newest plan that has been applied.
    pub(super) fn applied_generation(&self) -> u64 {
        self.routes
            .as_ref()
            .map_or(u64::MAX, |(_, progress)| progress.borrow().generation)
    }

    pub(super) fn set_plan(&mut self, plan: impl FnOnce() -> Plan) {
        let Some((routes, _)) = &mut self.routes else {
            return;
        };
        let plan = plan();
        let unreachable = plan.unreachable.iter().take(MAX_ERRORS + 1);
        self.unreachable = unreachable
            .map(|(range, reason)| (RecordId::Route(*range), reason.clone()))
            .collect();
        self.generation = routes.set_plan(plan);
        self.is_stale = true;
    }

    /// Replaces the node's own pods in the newest plan.
    pub(super) fn set_pods(&mut self, pods: LocalPods) {
        let Some((routes, _)) = &mut self.routes else {
            return;
        };
        self.generation = routes.set_pods(pods);
        self.is_stale = true;
    }

    /// Recomputes and returns the records that are not in force as written.
    pub(super) fn update_errors(
        &mut self,
        own: &str,
        records: &BTreeMap<RecordId, Record>,
    ) -> &BTreeMap<RecordId, String> {
        let Some((_, progress)) = &mut self.routes else {
            return &self.errors;
        };
        // An error means that the worker has ended and nothing more will come.
        if !progress.has_changed().unwrap_or(false) && !self.is_stale {
            return &self.errors;
        }
        self.is_stale = false;
        let mut found = self.unreachable.clone();
        for (part, reason) in progress
            .borrow_and_update()
            .failed
            .iter()
            .take(2 * MAX_ERRORS)
        {
            if let Some(id) = record_of(part, own, records) {
                found.insert(id, format!("{part}: {reason}"));
            }
        }
        if let Some((id, _)) = found.iter().nth(MAX_ERRORS) {
            let id = id.clone();
            drop(found.split_off(&id));
            if let Some(mut last) = found.last_entry() {
                last.get_mut().push_str(
                    "; more records than can be listed are not in force, see the agent's log",
                );
            }
        }
        self.errors = found;
        &self.errors
    }

    /// Checks whether routing has failed for longer than the grace period.
    pub(super) fn check_fault(&mut self, now: Instant) -> Option<RoutingFault> {
        let (_, progress) = self.routes.as_ref()?;
        let progress = progress.borrow();
        if progress.failed.is_empty() {
            self.failing_since = None;
            return None;
        }
        let since = *self.failing_since.get_or_insert(now);
        (now.saturating_duration_since(since) >= GRACE).then(|| describe_failures(&progress.failed))
    }

    /// When the check has to be repeated because the grace period ends.
    pub(super) fn next_check(&self, now: Instant) -> Option<Instant> {
        self.failing_since
            .map(|since| since + GRACE)
            .filter(|due| *due > now)
    }
}

fn describe_failures(failed: &BTreeMap<RoutingPart, String>) -> RoutingFault {
    // Failures of the node itself first.
    let (own, others): (Vec<_>, Vec<_>) = failed.iter().partition(|(part, _)| concerns_node(part));
    let mut reason = "routing could not be programmed".to_owned();
    for (index, (part, why)) in own.iter().chain(&others).take(MAX_NAMED).enumerate() {
        // Writing into a string does not fail.
        let _ = write!(
            reason,
            "{} {part}: {why}",
            if index == 0 { ':' } else { ';' }
        );
    }
    if failed.len() > MAX_NAMED {
        let _ = write!(reason, "; and {} more", failed.len() - MAX_NAMED);
    }
    RoutingFault {
        reason,
        is_own: !own.is_empty(),
    }
}

fn concerns_node(part: &RoutingPart) -> bool {
    match part {
        RoutingPart::Netlink | RoutingPart::Forwarding(_) | RoutingPart::Tunnel(_) => true,
        RoutingPart::Link(name) => TunnelKind::of_device(name).is_some(),
        RoutingPart::Peer(_) | RoutingPart::Route(_) => false,
    }
}

/// The record that a failed part belongs to; failures of the node itself belong to its Node.
fn record_of(
    part: &RoutingPart,
    own: &str,
    records: &BTreeMap<RecordId, Record>,
) -> Option<RecordId> {
    match part {
        part if concerns_node(part) => Some(RecordId::Node(own.to_owned())),
        RoutingPart::Route(range) => {
            Some(RecordId::Route(*range)).filter(|id| records.contains_key(id))
        }
        RoutingPart::Peer(address) => globals(records).find_map(|(id, record)| match record {
            Record::Node(info) => {
                let tunnels = TunnelKind::ALL.map(|kind| info.tunnel_address(kind));
                tunnels.contains(&Some(*address)).then(|| id.clone())
            }
            _ => None,
        }),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use margay_api::network::{Encapsulation, Mac, NodeInfo, Vtep};
    use margay_api::rule::IpVersion;
    use margay_calc::model::RouteRecord;

    struct Fixed(watch::Receiver<Progress>);

    impl Routes for Fixed {
        fn set_plan(&mut self, _: Plan) -> u64 {
            1
        }

        fn set_pods(&mut self, _: LocalPods) -> u64 {
            1
        }

        fn progress(&self) -> watch::Receiver<Progress> {
            self.0.clone()
        }
    }

    fn mk_routing() -> (watch::Sender<Progress>, Routing) {
        let (sender, seen) = watch::channel(Progress::default());
        (sender, Routing::new(Some(Box::new(Fixed(seen)))))
    }

    fn range(text: &str) -> ipnet::IpNet {
        text.parse().expect("a range")
    }

    fn mk_records() -> BTreeMap<RecordId, Record> {
        let vtep = Some(Vtep {
            address: [10, 1, 2, 0].into(),
            mac: Mac([0x66; 6]),
        });
        let route = RouteRecord {
            node: "other".to_owned(),
            encapsulation: Encapsulation::Vxlan,
        };
        [
            (
                RecordId::Node("other".to_owned()),
                Record::Node(NodeInfo {
                    vtep,
                    ..NodeInfo::default()
                }),
            ),
            (RecordId::Route(range("10.1.2.0/26")), Record::Route(route)),
        ]
        .into()
    }

    #[test]
    fn what_fails_is_the_error_of_its_record_and_of_the_node_only_if_it_is_its_own() {
        let node = |name: &str| Some(RecordId::Node(name.to_owned()));
        for (part, id, is_own) in [
            (RoutingPart::Netlink, node("own"), true),
            (RoutingPart::Forwarding(IpVersion::V4), node("own"), true),
            (RoutingPart::Tunnel(TunnelKind::Ipip), node("own"), true),
            (
                RoutingPart::Link("vxlan.calico".to_owned()),
                node("own"),
                true,
            ),
            (RoutingPart::Link("cali1".to_owned()), None, false),
            (
                RoutingPart::Peer([10, 1, 2, 0].into()),
                node("other"),
                false,
            ),
            (RoutingPart::Peer([10, 1, 9, 0].into()), None, false),
            (
                RoutingPart::Route(range("10.1.2.0/26")),
                Some(RecordId::Route(range("10.1.2.0/26"))),
                false,
            ),
            (RoutingPart::Route(range("10.1.1.5/32")), None, false),
        ] {
            let failed = BTreeMap::from([(part.clone(), "ENETDOWN".to_owned())]);
            let (sender, mut routing) = mk_routing();
            sender.send_modify(|progress| progress.failed.clone_from(&failed));
            let errors = routing.update_errors("own", &mk_records());
            assert_eq!(errors.keys().next(), id.as_ref(), "{part:?}");
            let start = Instant::now();
            assert_eq!(routing.check_fault(start), None, "a flap");
            assert_eq!(routing.next_check(start), Some(start + GRACE));
            let fault = routing.check_fault(start + GRACE).expect("it lasts");
            assert_eq!(fault.is_own, is_own, "{part:?}");
            assert!(fault.reason.contains("ENETDOWN"), "{}", fault.reason);
            sender.send_modify(|progress| progress.failed.clear());
            assert_eq!(
                (
                    routing.check_fault(start + GRACE),
                    routing.next_check(start)
                ),
                (None, None)
            );
        }
    }

    #[test]
    fn a_list_of_too_many_errors_is_cut_off_and_ends_with_a_note() {
        let (_sender, mut routing) = mk_routing();
        let unreachable = (0..2 * MAX_ERRORS).map(|number| {
            let range = range(&format!("10.{}.{}.0/26", number / 256, number % 256));
            (range, "no way".to_owned())
        });
        routing.set_plan(|| Plan {
            unreachable: unreachable.collect(),
            ..Plan::default()
        });
        let errors = routing.update_errors("own", &BTreeMap::new());
        assert_eq!(errors.len(), MAX_ERRORS);
        assert!(
            errors
                .values()
                .last()
                .is_some_and(|reason| reason.contains("more records than can be listed"))
        );
    }
}
