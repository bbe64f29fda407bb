//! ADD, DEL, CHECK, STATUS and GC of the CNI specification 1.1.0, as the agent does them.
//!
//! An ADD is a list of steps each of which can be taken back; it answers only when the pod's policy is in the kernel, and a failure anywhere
//! leaves nothing behind. While the link is made the address is claimed, and while the pod's side is configured its policy is programmed.

use std::collections::{BTreeMap, BTreeSet};
use std::fs::File;
use std::sync::{Arc, Mutex, MutexGuard, Weak};
use std::time::Duration;

use ipnet::IpNet;
use margay_api::endpoint::EndpointKey;
use margay_proto::cni::{self, code};
use tokio::sync::watch;
use tracing::Instrument;

use super::attachment::{Attachment, Attachments, handle};
use super::ports::{AddressRequest, Addresses, Announcer, Enforcer, NoAddress};
use super::request::{self, Config, Refusal};
use crate::net::netlink::Socket;
use crate::net::pod::{self, PodError, PodLink};
use crate::net::removal::Removal;

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
        let namespace = request::namespace(&asked.netns)?;
        let pod = self.pod(&wanted.endpoint());
        let _alone = pod.lock().await;
        let mtu = if call.config.mtu == 0 { *self.parts.mtu.borrow() } else { call.config.mtu };
        let is_finished = |present: &Attachment| !present.mac.is_empty() && present.netns == asked.netns;
        let present = self.attachments().get(&wanted.id).cloned();
        if let Some(present) = present.filter(is_finished)
            && self.check_link(&present, namespace.try_clone().map_err(io)?, mtu).await.is_ok()
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
        self.attachments().put(wanted.clone()).map_err(io)?;
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
            None => self.parts.addresses.release(handle(&call.network, &id)).await.map_err(unavailable),
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

    /// Takes back the ADDs that an earlier run of the agent did not finish: nobody got an answer to them.
    pub async fn recover(&self) {
        let unfinished: Vec<Attachment> =
            self.attachments().iter().filter(|attachment| attachment.mac.is_empty()).cloned().collect();
        for attachment in unfinished {
            let pod = self.pod(&attachment.endpoint());
            let _alone = pod.lock().await;
            let is_still_unfinished =
                self.attachments().get(&attachment.id).is_some_and(|present| present.mac.is_empty());
            if !is_still_unfinished {
                continue;
            }
            if let Err(error) = self.remove(&attachment).await {
                tracing::warn!(pod = %attachment.endpoint(), %error, "an unfinished ADD could not be taken back; DEL or GC will");
            }
        }
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
        let request = AddressRequest { handle, endpoint, ipv4, ipv6, named_by_pod, exact };
        let claim = self.parts.addresses.assign(request);
        let names = (wanted.interface.clone(), wanted.id.ifname.clone());
        let same = namespace.try_clone().map_err(io)?;
        let link = blocking(move || {
            let link = PodLink { host: &names.0, pod: &names.1, namespace: &same, mtu };
            pod::create(&mut Socket::open()?, &link)
        });
        let (claimed, index) = tokio::join!(
            claim.instrument(tracing::info_span!("ipam.assign")),
            link.instrument(tracing::info_span!("link.create"))
        );
        wanted.addresses = claimed.map_err(no_address)?;
        let index = index.map_err(kernel)?;
        self.attachments().put(wanted.clone()).map_err(io)?;

        let (names, addresses) = ((wanted.interface.clone(), wanted.id.ifname.clone()), wanted.addresses.clone());
        let configured = blocking(move || {
            let link = PodLink { host: &names.0, pod: &names.1, namespace: &namespace, mtu };
            let mac = pod::configure(&link, &addresses)?;
            pod::route(&mut Socket::open()?, index, &addresses)?;
            Ok(mac)
        });
        let (configured, enforced) =
            tokio::join!(configured.instrument(tracing::info_span!("link.configure")), self.enforce(call, wanted));
        wanted.mac = configured.map_err(kernel)?.0.map(|byte| format!("{byte:02x}")).join(":");
        enforced?;
        self.attachments().put(wanted.clone()).map_err(io)
    }

    /// Waits until the pod's policy is in the kernel: fails closed when that takes too long, and the runtime tries again.
    async fn enforce(&self, call: &Call, attachment: &Attachment) -> Result<(), Refusal> {
        let configured = match call.config.policy_setup_timeout_seconds {
            0 => self.parts.policy_timeout,
            seconds => Duration::from_secs(seconds),
        };
        let limit = request::patience(call.timeout_millis, configured);
        let addresses = attachment.addresses.iter().map(IpNet::addr).collect();
        let attach = self.parts.enforcer.attach(attachment.endpoint(), attachment.interface.clone(), addresses);
        match tokio::time::timeout(limit, attach.instrument(tracing::info_span!("policy.attach"))).await {
            Ok(Ok(())) => Ok(()),
            Ok(Err(error)) => Err(Refusal::new(code::TRY_AGAIN, error.to_string())),
            Err(_) => {
                let reason = self
                    .parts
                    .enforcer
                    .not_ready()
                    .unwrap_or_else(|| "nothing is known of the pod's policy yet".to_owned());
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

    /// Takes an attachment back: the link and the pod's place in the rules first, so that nothing passes any more, the address last, so that nobody gets
    /// it while it is in use.
    async fn remove(&self, attachment: &Attachment) -> Result<(), Refusal> {
        let shared = self.attachments().rivals(attachment).iter().any(|rival| !rival.addresses.is_empty());
        if !shared {
            let (endpoint, host) = (attachment.endpoint(), attachment.interface.clone());
            let link = self.parts.links.remove(host.clone()).instrument(tracing::info_span!("link.remove"));
            let policy = self.parts.enforcer.detach(endpoint, host).instrument(tracing::info_span!("policy.detach"));
            let (removed, ()) = tokio::join!(link, policy);
            removed.map_err(|error| kernel(error.into()))?;
        }
        self.parts.addresses.release(attachment.handle()).await.map_err(unavailable)?;
        self.attachments().remove(&attachment.id).map_err(io)?;
        if !shared {
            self.parts.announcer.withdraw(attachment);
        }
        Ok(())
    }

    async fn check_link(&self, attachment: &Attachment, namespace: File, mtu: u32) -> Result<(), PodError> {
        let attachment = attachment.clone();
        blocking(move || {
            let link = PodLink { host: &attachment.interface, pod: &attachment.id.ifname, namespace: &namespace, mtu };
            pod::check(&mut Socket::open()?, &link, &attachment.addresses)
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

#[cfg(test)]
mod tests;
