//! ADD, DEL, CHECK, STATUS and GC of the CNI specification 1.1.0, as the agent does them.
//!
//! An ADD is a list of steps each of which can be taken back; it answers only when the pod's policy is in the kernel, and a failure anywhere
//! leaves nothing behind. While the link is made the address is claimed, and while the pod's side is configured its policy is programmed.

use std::collections::{BTreeMap, BTreeSet};
use std::fs::File;
use std::net::IpAddr;
use std::sync::{Arc, Mutex, MutexGuard, Weak};
use std::time::Duration;

use ipnet::IpNet;
use margay_api::endpoint::EndpointKey;
use margay_proto::cni::{self, code};
use tokio::sync::watch;
use tracing::Instrument;

use super::attachment::{Attachment, Attachments, Leftover, handle};
use super::ports::{Announcer, Enforcer};
use super::request::{self, Config, Refusal};
use margay_dataplane::routes::conntrack::{Conntrack, Extent, TableError};
use margay_dataplane::routes::pod::{self, PodError, PodLink};
use margay_dataplane::routes::present;
use margay_dataplane::routes::removal::{self, Removal};
use margay_ipam::request::{AddressRequest, Addresses, NoAddress};
use margay_netlink::route::RouteSocket;

/// What the service works with.
pub struct Parts<E, A, N> {
    /// Policy.
    pub enforcer: E,
    /// IPAM.
    pub addresses: A,
    /// The rest of the cluster.
    pub announcer: N,
    /// Takes pods' links away.
    pub links: Removal,
    /// Ends the conversations of addresses that come and go.
    pub conntrack: Conntrack,
    /// MTU of pods, unless their network configuration has one.
    pub mtu: watch::Receiver<u32>,
    /// How long an ADD waits for policy, unless the network configuration says.
    pub policy_timeout: Duration,
}

/// See the module.
pub struct Service<E, A, N> {
    parts: Parts<E, A, N>,
    attachments: Mutex<Attachments>,
    /// Calls for the same pod wait for each other. An entry is dropped with its last user.
    pods: Mutex<BTreeMap<EndpointKey, Weak<tokio::sync::Mutex<()>>>>,
}

/// One call, parsed.
pub struct Call {
    /// Name of the network.
    pub network: String,
    /// The network configuration.
    pub config: Config,
    /// How long the plugin waits.
    pub timeout_millis: u32,
}

impl<E: Enforcer, A: Addresses, N: Announcer> Service<E, A, N> {
    /// A service over what earlier runs have left.
    pub fn new(parts: Parts<E, A, N>, attachments: Attachments) -> Self {
        Self { parts, attachments: Mutex::new(attachments), pods: Mutex::default() }
    }

    /// Attaches a pod. Asked again for the same attachment, the same answer.
    pub async fn add(&self, call: &Call, asked: &cni::Attachment) -> Result<cni::Result, Refusal> {
        let mut wanted = request::attachment(&call.network, asked)?;
        wanted.mtu = call.config.mtu;
        let namespace = request::namespace(&asked.netns)?;
        let pod = self.pod(&wanted.endpoint());
        let _alone = pod.lock().await;
        let mtu = if call.config.mtu == 0 { *self.parts.mtu.borrow() } else { call.config.mtu };
        self.check_rivals(&wanted)?;
        let is_same = |present: &Attachment| present.is_finished && present.netns == asked.netns;
        let present = self.attachments().get(&wanted.id).cloned();
        if let Some(present) = present.filter(is_same)
            && let Ok(mtu) = self.check_link(&present, namespace.try_clone().map_err(io)?, mtu).await
        {
            self.enforce(call, &present).await?;
            // An agent that ended right after it had made it has told nobody.
            self.parts.announcer.announce(&present);
            return Ok(result(&present, mtu));
        }
        let rivals = self.attachments().rivals(&wanted);
        for rival in rivals {
            self.remove(&rival).await?;
        }
        self.reserve(&wanted)?;
        match self.plumb(call, &mut wanted, namespace, mtu).await {
            Ok(()) => {
                self.parts.announcer.announce(&wanted);
                Ok(result(&wanted, mtu))
            }
            Err(refusal) => {
                if let Err(error) = self.remove(&wanted).await {
                    tracing::warn!(pod = %wanted.endpoint(), %error, "a failed ADD could not be taken back whole; DEL or GC will");
                }
                Err(refusal)
            }
        }
    }

    /// Detaches a pod: on any partial state, and on none at all, with success.
    pub async fn del(&self, call: &Call, asked: &cni::Attachment) -> Result<(), Refusal> {
        let id = request::id(asked)?;
        let known = self.attachments().get(&id).map(Attachment::endpoint);
        let pod = known.or_else(|| request::endpoint(asked)).map(|endpoint| self.pod(&endpoint));
        let _alone = match &pod {
            Some(pod) => Some(pod.lock().await),
            None => None,
        };
        // Only now: an ADD whose turn came first has made what was not there before.
        let known = self.attachments().get(&id).cloned();
        match known {
            Some(attachment) => self.remove(&attachment).await,
            None => {
                let handle = handle(&call.network, &id);
                if self.attachments().iter().any(|other| other.handle() == handle) {
                    // Another interface of the sandbox has what is kept under it; this one was refused.
                    return Ok(());
                }
                self.purge(self.unheld(&call.config.previous_addresses()), Extent::Whole).await?;
                self.parts.addresses.release(handle).await.map_err(unavailable)
            }
        }
    }

    /// Compares an attachment with what should be.
    pub async fn check(&self, call: &Call, asked: &cni::Attachment) -> Result<(), Refusal> {
        let id = request::id(asked)?;
        let namespace = request::namespace(&asked.netns)?;
        let unknown = || {
            Refusal::new(
                code::UNKNOWN_CONTAINER,
                format!(
                    "{} of container {} is not attached on this node; delete and add it again",
                    id.ifname, id.container
                ),
            )
        };
        let attachment = self.attachments().get(&id).cloned().ok_or_else(unknown)?;
        let mtu = if call.config.mtu == 0 { *self.parts.mtu.borrow() } else { call.config.mtu };
        self.check_link(&attachment, namespace, mtu).await.map_err(kernel)?;
        self.enforce(call, &attachment).await
    }

    /// Takes back the ADDs that an earlier run of the agent did not finish: nobody got an answer to them. Ends the conversations of pods that went while no
    /// agent ran; their DEL is still to come.
    pub async fn recover(&self) {
        self.recover_leftovers().await;
        self.forget_gone().await;
        let unfinished: Vec<Attachment> =
            self.attachments().iter().filter(|attachment| !attachment.is_finished).cloned().collect();
        for attachment in unfinished {
            let pod = self.pod(&attachment.endpoint());
            let _alone = pod.lock().await;
            let is_still_unfinished =
                self.attachments().get(&attachment.id).is_some_and(|present| !present.is_finished);
            if !is_still_unfinished {
                continue;
            }
            if let Err(error) = self.remove(&attachment).await {
                tracing::warn!(pod = %attachment.endpoint(), %error, "an unfinished ADD could not be taken back; DEL or GC will");
            }
        }
    }

    /// Ends the conversations of attachments whose links have gone with their pods.
    async fn forget_gone(&self) {
        let links = match blocking(|| Ok(present::links(&mut RouteSocket::open()?)?)).await {
            Ok(links) => links,
            Err(error) => {
                return tracing::warn!(%error, "links cannot be listed; DEL ends the conversations of pods that went");
            }
        };
        let gone: Vec<Attachment> = self
            .attachments()
            .iter()
            .filter(|attachment| !attachment.addresses.is_empty() && !links.contains_key(&attachment.interface))
            .cloned()
            .collect();
        let purges = gone.iter().map(|attachment| async {
            let pod = self.pod(&attachment.endpoint());
            let _alone = pod.lock().await;
            if let Err(error) = self.purge(self.left_by(attachment), Extent::Whole).await {
                tracing::warn!(pod = %attachment.endpoint(), %error, "conversations of a pod that went; DEL ends them");
            }
        });
        futures::future::join_all(purges).await;
    }

    /// Whether an ADD would succeed now.
    pub fn status(&self) -> Result<(), Refusal> {
        match self.parts.enforcer.not_ready() {
            Some(reason) => Err(Refusal::new(code::NOT_AVAILABLE, reason)),
            None => Ok(()),
        }
    }

    /// Detaches everything of the network that is not in the list.
    pub async fn gc(&self, call: &Call, valid: &[cni::ValidAttachment]) -> Result<(), Refusal> {
        let valid: BTreeSet<(&str, &str)> =
            valid.iter().map(|one| (one.container_id.as_str(), one.ifname.as_str())).collect();
        let is_stale = |attachment: &&Attachment| {
            let id = (attachment.id.container.as_str(), attachment.id.ifname.as_str());
            attachment.network == call.network && !valid.contains(&id)
        };
        let stale: Vec<Attachment> = self.attachments().iter().filter(is_stale).cloned().collect();
        let removals = stale.iter().map(|attachment| async {
            let pod = self.pod(&attachment.endpoint());
            let _alone = pod.lock().await;
            self.remove(attachment).await
        });
        futures::future::join_all(removals).await.into_iter().collect()
    }

    async fn plumb(&self, call: &Call, wanted: &mut Attachment, namespace: File, mtu: u32) -> Result<(), Refusal> {
        let [ipv4, ipv6] = call.config.demands()?;
        let (handle, endpoint, exact) = (wanted.handle(), wanted.endpoint(), call.config.requested()?);
        let named_by_pod = call.config.names_pools();
        let request = AddressRequest { ipv4, ipv6, named_by_pod, exact, ..AddressRequest::of_pod(handle, &endpoint) };
        let claim = self.parts.addresses.assign(request);
        let mac = pod::mac(&wanted.id.container, &wanted.id.ifname);
        let names = (wanted.interface.clone(), wanted.id.ifname.clone());
        let same = namespace.try_clone().map_err(io)?;
        let link = blocking(move || {
            let link = PodLink { host: &names.0, pod: &names.1, namespace: &same, mtu, mac };
            pod::create(&mut RouteSocket::open()?, &link)
        });
        let (claimed, index) = tokio::join!(
            claim.instrument(tracing::info_span!("ipam.assign")),
            link.instrument(tracing::info_span!("link.create"))
        );
        wanted.addresses = claimed.map_err(no_address)?;
        let index = index.map_err(kernel)?;
        let file = self.attachments().put(wanted.clone()).map_err(io)?;

        let (names, addresses) = ((wanted.interface.clone(), wanted.id.ifname.clone()), wanted.addresses.clone());
        let configured = blocking(move || {
            pod::configure(&PodLink { host: &names.0, pod: &names.1, namespace: &namespace, mtu, mac }, &addresses)
        });
        let synced = blocking(move || Ok(file.sync_all()?));
        let (configured, synced, opened) = tokio::join!(
            configured.instrument(tracing::info_span!("link.configure")),
            synced.instrument(tracing::info_span!("attachment.sync")),
            self.open(call, wanted, index)
        );
        configured.map_err(kernel)?;
        synced.map_err(kernel)?;
        opened?;
        self.attachments().finish(&wanted.id).map_err(io)
    }

    /// Refuses what would take the link of another pod, or of the pod's own sandbox, away: names of interfaces are hashes of the pods' names.
    fn check_rivals(&self, wanted: &Attachment) -> Result<(), Refusal> {
        stands_in_the_way(&self.attachments(), wanted)
    }

    /// Notes the attachment before anything is made for it.
    fn reserve(&self, wanted: &Attachment) -> Result<(), Refusal> {
        let mut attachments = self.attachments();
        // Another pod's may have come while earlier sandboxes were taken back.
        stands_in_the_way(&attachments, wanted)?;
        attachments.put(wanted.clone()).map(drop).map_err(io)
    }

    /// Lets the pod's packets pass by its policy. Before that its addresses lead to its link, which carries nothing yet, and the conversations that others
    /// had with them are ended: a packet meets either no policy and goes no further, or begins anew. Without the route it might go elsewhere meanwhile.
    async fn open(&self, call: &Call, wanted: &Attachment, index: u32) -> Result<(), Refusal> {
        self.parts.enforcer.link_made(wanted.interface.clone(), index, wanted.attached()).await;
        let addresses = wanted.addresses.clone();
        let routed = blocking(move || pod::route(&mut RouteSocket::open()?, index, &addresses));
        routed.instrument(tracing::info_span!("link.route")).await.map_err(kernel)?;
        self.purge(wanted.addresses.iter().map(IpNet::addr).collect(), Extent::Link).await?;
        self.enforce(call, wanted).await
    }

    /// Ends the conversations of these addresses, of which none has a pod now.
    async fn purge(&self, addresses: Vec<IpAddr>, extent: Extent) -> Result<(), Refusal> {
        let purged = self.parts.conntrack.purge(addresses.clone(), extent);
        let refusal = |error: TableError| {
            let addresses: Vec<String> = addresses.iter().map(IpAddr::to_string).collect();
            Refusal::new(
                code::TRY_AGAIN,
                format!(
                    "earlier conversations of {} could not be ended, and would pass policy: {error}",
                    addresses.join(" and ")
                ),
            )
        };
        purged.instrument(tracing::info_span!("conntrack.purge")).await.map_err(refusal)
    }

    /// Waits until the pod's policy is in the kernel: fails closed when that takes too long, and the runtime tries again.
    async fn enforce(&self, call: &Call, attachment: &Attachment) -> Result<(), Refusal> {
        let configured = match call.config.policy_setup_timeout_seconds {
            0 => self.parts.policy_timeout,
            seconds => Duration::from_secs(seconds),
        };
        let limit = request::patience(call.timeout_millis, configured);
        let attach = self.parts.enforcer.attach(attachment.interface.clone(), attachment.attached());
        match tokio::time::timeout(limit, attach.instrument(tracing::info_span!("policy.attach"))).await {
            Ok(Ok(())) => Ok(()),
            Ok(Err(error)) => Err(Refusal::new(code::TRY_AGAIN, error.to_string())),
            Err(_) => {
                let reason = self.parts.enforcer.not_ready().unwrap_or_else(|| {
                    "nothing is known yet of the policy of this pod, which may have a new uid".to_owned()
                });
                Err(Refusal::new(
                    code::TRY_AGAIN,
                    format!(
                        "policy of {} was not in force within {limit:?}: {reason}; see margay-typha and the agent's log",
                        attachment.endpoint()
                    ),
                ))
            }
        }
    }

    /// Takes an attachment back: the pod's place in the rules first, so that nothing passes its link any more, then its conversations, which nothing can begin
    /// anew, and the address last, so that nobody gets it while it is in use. The link may go later: who gets the address on this node takes over the route to it.
    async fn remove(&self, attachment: &Attachment) -> Result<(), Refusal> {
        let shared = self.attachments().rivals(attachment).iter().any(|rival| !rival.addresses.is_empty());
        if !shared {
            let (endpoint, host) = (attachment.endpoint(), attachment.interface.clone());
            let policy = self.parts.enforcer.detach(endpoint, host.clone());
            if !policy.instrument(tracing::info_span!("policy.detach")).await {
                let link = self.parts.links.remove(host.clone()).instrument(tracing::info_span!("link.remove"));
                link.await.map_err(|error| kernel(error.into()))?;
            }
        }
        self.purge(self.left_by(attachment), Extent::Whole).await?;
        self.parts.addresses.release(attachment.handle()).await.map_err(unavailable)?;
        let leftover = self.attachments().retire(&attachment.id).map_err(io)?;
        if !shared {
            self.parts.announcer.withdraw(attachment);
        }
        match leftover {
            Some(leftover) if shared => leftover.forget().map_err(io),
            Some(leftover) => self.clear_away(leftover).await,
            None => Ok(()),
        }
    }

    /// Sees to it that the link of a detached pod goes, which carries nothing any more; does not wait for it. Where that fails, the file is there for the
    /// next start.
    async fn clear_away(&self, leftover: Leftover) -> Result<(), Refusal> {
        let (links, enforcer) = (self.parts.links.clone(), self.parts.enforcer.clone());
        let Some(index) = removal::index_of(&leftover.interface) else {
            enforcer.link_gone(leftover.interface.clone(), None).await;
            return leftover.forget().map_err(io);
        };
        tokio::spawn(async move {
            let gone = match links.expect_gone(index).await {
                Ok(()) => {
                    enforcer.link_gone(leftover.interface.clone(), Some(index)).await;
                    leftover.forget().map_err(|error| error.to_string())
                }
                Err(error) => Err(error.to_string()),
            };
            if let Err(error) = gone {
                tracing::warn!(
                    interface = leftover.interface,
                    error,
                    "the link of a detached pod is left; it carries nothing"
                );
            }
        });
        Ok(())
    }

    /// Links that detached pods have left to an earlier run.
    async fn recover_leftovers(&self) {
        let leftovers = self.attachments().take_leftovers();
        for leftover in leftovers {
            let interface = leftover.interface.clone();
            let is_in_use = self.attachments().iter().any(|attachment| attachment.interface == interface);
            let result = if is_in_use { leftover.forget().map_err(io) } else { self.clear_away(leftover).await };
            if let Err(error) = result {
                tracing::warn!(interface, %error, "the file about the link of a detached pod");
            }
        }
    }

    /// The addresses of an attachment that no other one has.
    fn left_by(&self, attachment: &Attachment) -> Vec<IpAddr> {
        let attachments = self.attachments();
        let others = attachments.iter().filter(|other| other.id != attachment.id);
        let held: BTreeSet<IpNet> = others.flat_map(|other| other.addresses.iter().copied()).collect();
        attachment.addresses.iter().filter(|address| !held.contains(address)).map(IpNet::addr).collect()
    }

    /// Those of these addresses that no attachment has.
    fn unheld(&self, addresses: &[IpAddr]) -> Vec<IpAddr> {
        let attachments = self.attachments();
        let held: BTreeSet<IpAddr> =
            attachments.iter().flat_map(|attachment| attachment.addresses.iter().map(IpNet::addr)).collect();
        addresses.iter().copied().filter(|address| !held.contains(address)).collect()
    }

    async fn check_link(&self, attachment: &Attachment, namespace: File, mtu: u32) -> Result<u32, PodError> {
        let attachment = attachment.clone();
        blocking(move || {
            let (host, pod) = (&attachment.interface, &attachment.id.ifname);
            let link = PodLink { host, pod, namespace: &namespace, mtu, mac: pod::mac(&attachment.id.container, pod) };
            pod::check(&mut RouteSocket::open()?, &link, &attachment.addresses)
        })
        .await
    }

    fn attachments(&self) -> MutexGuard<'_, Attachments> {
        self.attachments.lock().unwrap_or_else(|poisoned| poisoned.into_inner())
    }

    fn pod(&self, endpoint: &EndpointKey) -> Arc<tokio::sync::Mutex<()>> {
        let mut pods = self.pods.lock().unwrap_or_else(|poisoned| poisoned.into_inner());
        pods.retain(|_, lock| lock.strong_count() > 0);
        if let Some(lock) = pods.get(endpoint).and_then(Weak::upgrade) {
            return lock;
        }
        let lock = Arc::new(tokio::sync::Mutex::new(()));
        pods.insert(endpoint.clone(), Arc::downgrade(&lock));
        lock
    }
}

/// Refuses an attachment whose interface another pod has, or the pod itself in the same sandbox; earlier sandboxes of the pod make way.
fn stands_in_the_way(attachments: &Attachments, wanted: &Attachment) -> Result<(), Refusal> {
    for rival in attachments.rivals(wanted) {
        let (interface, pod) = (&wanted.interface, wanted.endpoint());
        if rival.endpoint() != pod {
            let text = format!(
                "interface {interface} of pod {pod} is that of pod {} on this node too: their names have the same hash; give one of them another name",
                rival.endpoint()
            );
            return Err(Refusal::new(code::TRY_AGAIN, text));
        }
        if rival.id.container == wanted.id.container {
            let text = format!(
                "CNI_IFNAME is {:?}: pod {pod} is attached by {} already, and this network gives a pod one interface; take it out of the pod's list of \
                 further networks",
                wanted.id.ifname, rival.id.ifname
            );
            return Err(Refusal::new(code::INVALID_ENVIRONMENT, text));
        }
    }
    Ok(())
}

async fn blocking<T: Send + 'static>(
    work: impl FnOnce() -> Result<T, PodError> + Send + 'static,
) -> Result<T, PodError> {
    match tokio::task::spawn_blocking(work).await {
        Ok(result) => result,
        Err(panic) => Err(PodError::Missing(format!("the kernel could not be asked: {panic}"))),
    }
}

fn result(attachment: &Attachment, mtu: u32) -> cni::Result {
    let host = cni::Interface {
        name: attachment.interface.clone(),
        mac: pod::HOST_MAC.0.map(|byte| format!("{byte:02x}")).join(":"),
        mtu,
        sandbox: String::new(),
    };
    let inside = cni::Interface {
        name: attachment.id.ifname.clone(),
        mac: attachment.mac.clone(),
        mtu,
        sandbox: attachment.netns.clone(),
    };
    let ip = |address: &IpNet| cni::Ip { address: address.to_string(), gateway: String::new(), interface: Some(1) };
    let default = |address: &IpNet| {
        let dst = if address.addr().is_ipv4() { "0.0.0.0/0" } else { "::/0" };
        cni::Route { dst: dst.to_owned(), gw: pod::gateway(address.addr()).to_string(), ..cni::Route::default() }
    };
    cni::Result {
        interfaces: vec![host, inside],
        ips: attachment.addresses.iter().map(ip).collect(),
        routes: attachment.addresses.iter().map(default).collect(),
        dns: None,
    }
}

fn io(error: std::io::Error) -> Refusal {
    Refusal::new(code::IO, error.to_string())
}

fn kernel(error: PodError) -> Refusal {
    Refusal::new(code::KERNEL, error.to_string())
}

fn no_address(error: NoAddress) -> Refusal {
    match error {
        NoAddress::Exhausted(_) | NoAddress::Refused(_) => Refusal::new(code::NO_ADDRESS, error.to_string()),
        NoAddress::Unavailable(_) => unavailable(error),
    }
}

fn unavailable(error: NoAddress) -> Refusal {
    Refusal::new(code::TRY_AGAIN, error.to_string())
}

mod mtu;
#[cfg(test)]
mod tests;
