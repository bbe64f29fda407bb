//! Routes that BGP peers have sent, in the kernel beside those that are planned.
//!
//! They have a protocol number of their own, so that a process without memory can tell them apart.
//! There may be a hundred thousand of them, so they are not part of a plan: changes come one by
//! one, merged by prefix, and are written in batches. A planned route of the same prefix hides a
//! learnt one. What an earlier process has left stays until [`LearnedRoutes::complete`] declares
//! that everything wanted has come.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;
use std::sync::Arc;

use ipnet::IpNet;
use margay_api::rule::IpVersion;
use netlink_packet_route::RouteNetlinkMessage;
use netlink_packet_route::route::{
    RouteAddress, RouteAttribute, RouteHeader, RouteMessage, RouteNextHop, RouteProtocol,
    RouteScope, RouteType, RouteVia,
};
use nix::errno::Errno;
use parking_lot::Mutex;
use tokio::sync::watch;

use super::hint::Hint;
use super::message;
use margay_netlink::route::{NetlinkError, RequestMode, RouteSocket};

/// Protocol number of learnt routes; those of the plan have
/// [`ROUTE_PROTOCOL`](super::plan::ROUTE_PROTOCOL).
pub const LEARNED_PROTOCOL: u8 = 83;
/// Prefixes that one turn of the worker handles, about 20 ms: pods wait behind it.
const TURN: usize = 2048;

/// Next hop of a route: an address on a link.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct LearnedHop {
    /// Gateway; for IPv4 routes it may be of IPv6 (RFC 8950).
    pub via: IpAddr,
    /// Index of the link.
    pub link: u32,
}

/// A learnt route.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct LearnedRoute {
    /// Next hops, at least one, in order and each once; packets are spread over them by flow.
    pub hops: Vec<LearnedHop>,
    /// Metric, which is not 0.
    pub metric: u32,
}

/// Change of a learnt route; `None`: it is not wanted any more.
pub type LearnedChange = (IpNet, Option<Arc<LearnedRoute>>);

/// How far the kernel has come.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct LearnedProgress {
    /// Wanted routes.
    pub wanted: usize,
    /// Routes in the kernel.
    pub installed: usize,
    /// Routes that the kernel refused last.
    pub failed: usize,
    /// One of them, with the reason.
    pub failure: Option<String>,
}

/// What the worker has not seen yet.
#[derive(Default)]
struct Inbox {
    /// Everything that is wanted so far is not any more, before `changes`.
    is_begun: bool,
    changes: BTreeMap<IpNet, Option<Arc<LearnedRoute>>>,
    complete: BTreeSet<IpVersion>,
}

/// Handle by which learnt routes are set. Cheap to clone.
#[derive(Clone)]
pub struct LearnedRoutes {
    inbox: Arc<Mutex<Inbox>>,
    wake: Arc<dyn Fn() + Send + Sync>,
    progress: watch::Receiver<LearnedProgress>,
}

impl LearnedRoutes {
    /// Another source of routes begins: those so far are kept in the kernel, until it sets them
    /// again or is [complete](Self::complete).
    pub fn begin(&self) {
        self.change(|inbox| {
            *inbox = Inbox {
                is_begun: true,
                ..Inbox::default()
            }
        });
    }

    /// Sets and removes routes. Does not block.
    pub fn set(&self, changes: impl IntoIterator<Item = LearnedChange>) {
        self.change(|inbox| inbox.changes.extend(changes));
    }

    /// Everything of an IP version has been set since [`Self::begin`]: what else the kernel has of
    /// ours goes.
    pub fn complete(&self, version: IpVersion) {
        self.change(|inbox| inbox.complete.extend([version]));
    }

    /// Removes all routes, also those of an earlier process.
    pub fn clear(&self) {
        self.begin();
        self.change(|inbox| inbox.complete = IpVersion::ALL.into());
    }

    /// How far the kernel has come.
    pub fn watch(&self) -> watch::Receiver<LearnedProgress> {
        self.progress.clone()
    }

    fn change(&self, change: impl FnOnce(&mut Inbox)) {
        change(&mut self.inbox.lock());
        (self.wake)();
    }
}

/// Reads whether the kernel has routes that were planned or learnt by an earlier process: packets
/// were forwarded all the time (RFC 4724 section 3).
pub fn has_routes_of_ours(socket: &mut RouteSocket) -> Result<bool, NetlinkError> {
    let ours = [super::plan::ROUTE_PROTOCOL, LEARNED_PROTOCOL].map(RouteProtocol::Other);
    for version in IpVersion::ALL {
        let found = socket.dump_map(message::get_routes(message::family_of(version)), |found| {
            matches!(&found, RouteNetlinkMessage::NewRoute(route)
                if ours.contains(&route.header.protocol))
            .then_some(())
        })?;
        if !found.is_empty() {
            return Ok(true);
        }
    }
    Ok(false)
}

#[derive(Debug, Default)]
struct Entry {
    wanted: Option<Arc<LearnedRoute>>,
    present: Option<Arc<LearnedRoute>>,
}

/// A request to the kernel, and what it means for the prefix.
#[derive(Debug, PartialEq, Eq)]
enum LearnedOp {
    Set(IpNet, Arc<LearnedRoute>),
    /// Of the same prefix there may be routes with other metrics.
    Remove(IpNet, Arc<LearnedRoute>),
}

impl LearnedOp {
    fn net(&self) -> IpNet {
        let (Self::Set(net, _) | Self::Remove(net, _)) = self;
        *net
    }

    fn request(&self) -> (RouteNetlinkMessage, RequestMode) {
        match self {
            Self::Set(net, route) => {
                let message = RouteNetlinkMessage::NewRoute(new_route(net, route));
                (message, RequestMode::Replace)
            }
            Self::Remove(net, route) => {
                let message = RouteNetlinkMessage::DelRoute(old_route(net, route.metric));
                (message, RequestMode::Change)
            }
        }
    }
}

/// The worker's part: what is wanted and what the kernel holds, by prefix.
pub(super) struct Learned {
    inbox: Arc<Mutex<Inbox>>,
    progress: watch::Sender<LearnedProgress>,
    entries: BTreeMap<IpNet, Entry>,
    /// Prefixes to be compared.
    pending: BTreeSet<IpNet>,
    /// Routes beside that of an entry, with other metrics.
    extra: Vec<(IpNet, Arc<LearnedRoute>)>,
    /// IP versions of which everything wanted is known.
    complete: BTreeSet<IpVersion>,
    failed: BTreeMap<IpNet, String>,
    /// Somebody sets routes, or has done so.
    is_used: bool,
    /// The kernel has been read and the entries are what it holds.
    is_read: bool,
    wanted: usize,
    installed: usize,
}

impl Learned {
    /// A part that does nothing until somebody sets routes. `wake` makes the worker call
    /// [`Self::take_changes`].
    pub(super) fn new(wake: impl Fn() + Send + Sync + 'static) -> (Self, LearnedRoutes) {
        let inbox = Arc::new(Mutex::new(Inbox::default()));
        let (progress, seen) = watch::channel(LearnedProgress::default());
        let handle = LearnedRoutes {
            inbox: inbox.clone(),
            wake: Arc::new(wake),
            progress: seen,
        };
        let own = Self {
            inbox,
            progress,
            entries: BTreeMap::new(),
            pending: BTreeSet::new(),
            extra: Vec::new(),
            complete: BTreeSet::new(),
            failed: BTreeMap::new(),
            is_used: false,
            is_read: false,
            wanted: 0,
            installed: 0,
        };
        (own, handle)
    }

    /// Takes over what has been set since the last call.
    pub(super) fn take_changes(&mut self) {
        let Inbox {
            is_begun,
            changes,
            complete,
        } = std::mem::take(&mut *self.inbox.lock());
        self.is_used |= is_begun || !changes.is_empty() || !complete.is_empty();
        if is_begun {
            self.complete.clear();
            self.entries
                .values_mut()
                .for_each(|entry| entry.wanted = None);
            self.wanted = 0;
        }
        for (net, route) in changes {
            let entry = self.entries.entry(net).or_default();
            self.wanted -= usize::from(entry.wanted.is_some());
            self.wanted += usize::from(route.is_some());
            entry.wanted = route;
            self.pending.insert(net);
        }
        let new: BTreeSet<IpVersion> = complete.difference(&self.complete).copied().collect();
        if !new.is_empty() {
            let unwanted = self.entries.iter().filter(|(net, entry)| {
                entry.wanted.is_none() && new.contains(&IpVersion::of(net.addr()))
            });
            self.pending.extend(unwanted.map(|(net, _)| *net));
            self.complete.extend(new);
        }
    }

    /// There is work for [`Self::exec`].
    pub(super) fn has_work(&self) -> bool {
        self.is_used && (!self.is_read || !self.pending.is_empty() || !self.extra.is_empty())
    }

    /// A route of this prefix is wanted and in the kernel, as far as known.
    fn is_in_force(&self, net: &IpNet) -> bool {
        let is_whole = |entry: &Entry| entry.wanted.is_some() && entry.wanted == entry.present;
        self.entries.get(net).is_some_and(is_whole)
    }

    /// The kernel may have lost routes; it is read again.
    pub(super) fn mark_stale(&mut self) {
        self.is_read = false;
    }

    /// Compares what failed once more.
    pub(super) fn retry(&mut self) {
        self.pending.extend(self.failed.keys().copied());
    }

    /// What failed last waits for [`Self::retry`].
    pub(super) fn is_failing(&self) -> bool {
        !self.failed.is_empty()
    }

    /// Compares these prefixes again.
    pub(super) fn touch(&mut self, nets: &[IpNet]) {
        self.pending.extend(nets);
    }

    /// A route of this prefix is wanted or in the kernel.
    pub(super) fn has(&self, net: &IpNet) -> bool {
        self.entries.contains_key(net)
    }

    /// What was noticed is a reason to read the kernel again.
    pub(super) fn is_concerned(&self, hints: &BTreeSet<Hint>) -> bool {
        let concerns = |hint: &Hint| match hint {
            Hint::Lost | Hint::Underlay | Hint::AddressRemoved(_) => !self.entries.is_empty(),
            Hint::AddressAdded(_) => self.is_failing(),
            Hint::Route(net) => self.is_in_force(net),
            _ => false,
        };
        hints.iter().any(concerns)
    }

    /// Writes what is pending, at most a turn of it. `hides`: there is a planned route of the
    /// prefix.
    ///
    /// # Errors
    /// A failure of the socket; what the kernel refuses is noted.
    pub(super) fn exec(
        &mut self,
        socket: &mut RouteSocket,
        hides: &dyn Fn(&IpNet) -> bool,
    ) -> Result<(), NetlinkError> {
        if !self.is_used {
            return Ok(());
        }
        if !self.is_read {
            self.read(socket)?;
        }
        let turn = std::iter::from_fn(|| self.pending.pop_first()).take(TURN);
        let turn: Vec<IpNet> = turn.collect();
        self.exec_nets(socket, &turn, hides)
    }

    /// Writes the routes of these prefixes now.
    ///
    /// # Errors
    /// As [`Self::exec`].
    pub(super) fn exec_nets(
        &mut self,
        socket: &mut RouteSocket,
        nets: &[IpNet],
        hides: &dyn Fn(&IpNet) -> bool,
    ) -> Result<(), NetlinkError> {
        let ops = self.take_ops(nets, hides);
        let requests = ops.iter().map(LearnedOp::request).collect();
        let refused: BTreeMap<usize, Errno> = match socket.exec_all(requests) {
            Ok(refused) => refused.into_iter().collect(),
            Err(error) => {
                // What has been done is not known.
                self.pending.extend(nets);
                self.is_read = false;
                return Err(error);
            }
        };
        for (position, op) in ops.into_iter().enumerate() {
            self.note_result(op, refused.get(&position).copied());
        }
        self.publish();
        Ok(())
    }

    fn note_result(&mut self, op: LearnedOp, refused: Option<Errno>) {
        let is_removal = matches!(op, LearnedOp::Remove(..));
        let is_gone = matches!(refused, Some(Errno::ESRCH | Errno::ENOENT | Errno::ENODEV));
        if let Some(errno) = refused.filter(|_| !(is_removal && is_gone)) {
            self.failed.insert(op.net(), errno.to_string());
            return;
        }
        let net = op.net();
        let Some(entry) = self.entries.get_mut(&net) else {
            return;
        };
        let former = entry.present.is_some();
        match op {
            LearnedOp::Set(_, route) => entry.present = Some(route),
            LearnedOp::Remove(_, route) if entry.present.as_ref() == Some(&route) => {
                entry.present = None;
            }
            LearnedOp::Remove(..) => {}
        }
        self.installed -= usize::from(former);
        self.installed += usize::from(entry.present.is_some());
        if entry.wanted.is_none() && entry.present.is_none() {
            self.entries.remove(&net);
        }
    }

    fn publish(&self) {
        let failure = self.failed.iter().next();
        let now = LearnedProgress {
            wanted: self.wanted,
            installed: self.installed,
            failed: self.failed.len(),
            failure: failure.map(|(net, why)| format!("{net}: {why}")),
        };
        self.progress.send_if_modified(|known| {
            let is_new = *known != now;
            *known = now;
            is_new
        });
    }

    /// The requests that bring these prefixes to what is wanted.
    fn take_ops(&mut self, nets: &[IpNet], hides: &dyn Fn(&IpNet) -> bool) -> Vec<LearnedOp> {
        let removed = self.extra.drain(..);
        let mut ops: Vec<LearnedOp> = removed
            .map(|(net, route)| LearnedOp::Remove(net, route))
            .collect();
        for net in nets.iter().copied() {
            self.failed.remove(&net);
            let Some(entry) = self.entries.get(&net) else {
                continue;
            };
            let is_hidden = hides(&net);
            let wanted = entry.wanted.as_ref().filter(|_| !is_hidden);
            let is_complete = self.complete.contains(&IpVersion::of(net.addr()));
            match (&entry.present, wanted) {
                (Some(present), Some(wanted)) if present == wanted => {}
                (present, Some(wanted)) => {
                    ops.push(LearnedOp::Set(net, wanted.clone()));
                    // The kernel has one route per metric.
                    let former = present.iter().filter(|old| old.metric != wanted.metric);
                    ops.extend(former.map(|old| LearnedOp::Remove(net, old.clone())));
                }
                (Some(present), None) if is_hidden || is_complete => {
                    ops.push(LearnedOp::Remove(net, present.clone()));
                }
                (None, None) if entry.wanted.is_none() => drop(self.entries.remove(&net)),
                _ => {}
            }
        }
        ops
    }

    /// Reads the learnt routes that the kernel holds, and compares all of them.
    fn read(&mut self, socket: &mut RouteSocket) -> Result<(), NetlinkError> {
        let mut found = Vec::new();
        for version in IpVersion::ALL {
            let request = message::get_routes_of(version, LEARNED_PROTOCOL);
            found.extend(socket.dump_map(request, |found| match found {
                RouteNetlinkMessage::NewRoute(message) => parse_route(&message),
                _ => None,
            })?);
        }
        self.note_read(found);
        self.is_read = true;
        Ok(())
    }

    fn note_read(&mut self, found: Vec<(IpNet, LearnedRoute)>) {
        let mut known: BTreeSet<Arc<LearnedRoute>> = BTreeSet::new();
        self.extra.clear();
        for entry in self.entries.values_mut() {
            entry.present = None;
        }
        self.installed = 0;
        for (net, route) in found {
            let route = known.get(&route).cloned().unwrap_or_else(|| {
                let route = Arc::new(route);
                known.insert(route.clone());
                route
            });
            let entry = self.entries.entry(net).or_default();
            match &mut entry.present {
                Some(present) if entry.wanted.as_ref() == Some(&route) => {
                    self.extra.push((net, std::mem::replace(present, route)));
                }
                Some(_) => self.extra.push((net, route)),
                none => {
                    *none = Some(route);
                    self.installed += 1;
                }
            }
        }
        let differs = |entry: &Entry| entry.wanted != entry.present;
        let nets = self.entries.iter().filter(|(_, entry)| differs(entry));
        self.pending.extend(nets.map(|(net, _)| *net));
    }
}

fn header(net: &IpNet) -> RouteHeader {
    RouteHeader {
        address_family: message::family_of(IpVersion::of(net.addr())),
        destination_prefix_length: net.prefix_len(),
        table: message::MAIN_TABLE,
        protocol: RouteProtocol::Other(LEARNED_PROTOCOL),
        ..RouteHeader::default()
    }
}

fn gateway(net: &IpNet, via: IpAddr) -> RouteAttribute {
    match via {
        IpAddr::V6(via) if net.addr().is_ipv4() => RouteAttribute::Via(RouteVia::Inet6(via)),
        via => RouteAttribute::Gateway(RouteAddress::from(via)),
    }
}

fn new_route(net: &IpNet, route: &LearnedRoute) -> RouteMessage {
    let mut message = RouteMessage::default();
    message.header = header(net);
    message.header.scope = RouteScope::Universe;
    message.header.kind = RouteType::Unicast;
    message.attributes.extend(message::destination(net));
    message
        .attributes
        .push(RouteAttribute::Priority(route.metric));
    if let [hop] = route.hops.as_slice() {
        let way = [gateway(net, hop.via), RouteAttribute::Oif(hop.link)];
        message.attributes.extend(way);
        return message;
    }
    let hops = route.hops.iter().map(|hop| {
        let mut next = RouteNextHop::default();
        next.interface_index = hop.link;
        next.attributes = vec![gateway(net, hop.via)];
        next
    });
    message
        .attributes
        .push(RouteAttribute::MultiPath(hops.collect()));
    message
}

fn old_route(net: &IpNet, metric: u32) -> RouteMessage {
    let mut message = RouteMessage::default();
    message.header = header(net);
    // Whatever its scope and kind.
    message.header.scope = RouteScope::NoWhere;
    message.header.kind = RouteType::Unspec;
    message.attributes.extend(message::destination(net));
    message.attributes.push(RouteAttribute::Priority(metric));
    message
}

/// Parses a learnt route; `None`: it is another one.
fn parse_route(message: &RouteMessage) -> Option<(IpNet, LearnedRoute)> {
    let is_ours = message.header.protocol == RouteProtocol::Other(LEARNED_PROTOCOL)
        && message.header.table == message::MAIN_TABLE;
    if !is_ours {
        return None;
    }
    let mut metric = 0;
    let mut hops = Vec::new();
    for attribute in &message.attributes {
        match attribute {
            RouteAttribute::Priority(value) => metric = *value,
            RouteAttribute::MultiPath(found) => {
                let ways = found
                    .iter()
                    .map(|hop| (&hop.attributes, Some(hop.interface_index)));
                hops.extend(ways.filter_map(|(attributes, link)| parse_hop(attributes, link)));
            }
            _ => {}
        }
    }
    hops.extend(parse_hop(&message.attributes, None));
    hops.sort_unstable();
    Some((
        message::destination_of(message)?,
        LearnedRoute { hops, metric },
    ))
}

fn parse_hop(attributes: &[RouteAttribute], link: Option<u32>) -> Option<LearnedHop> {
    let (via, own_link) = message::way_of(attributes);
    Some(LearnedHop {
        via: via?,
        link: own_link.or(link)?,
    })
}

#[cfg(test)]
mod tests;
