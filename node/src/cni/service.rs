//! The CNI service: ADD, DEL, CHECK, STATUS and GC of the CNI specification 1.1.0.
//!
//! ADD is a sequence of steps, each of which can be undone. It succeeds only when the pod's policy
//! is in the kernel, and a failure anywhere leaves nothing behind. The address is claimed while the
//! link is created, and policy is programmed while the pod's side is configured.

use std::collections::{BTreeMap, BTreeSet};
use std::fs::File;
use std::net::IpAddr;
use std::sync::{Arc, Weak};
use std::time::Duration;

use ipnet::IpNet;
use margay_api::endpoint::EndpointKey;
use margay_proto::cni::{self, code};
use parking_lot::{Mutex, MutexGuard};
use tokio::sync::watch;
use tracing::Instrument;

use super::attachment::{Attachment, Attachments, ipam_handle};
use super::ports::{Announcer, Enforcer};
use super::request::{self, CniError, Config};
use margay_dataplane::routes::conntrack::{Conntrack, Extent, TableError};
use margay_dataplane::routes::pod::{self, PodError, PodLink};
use margay_dataplane::routes::removal::LinkRemover;
use margay_ipam::request::{AddressRequest, Addresses};
use margay_netlink::route::RouteSocket;
use response::{address_error, cni_result, io_error, kernel_error, unavailable_error};

/// Dependencies of the service.
pub struct ServiceParts<E, A, N> {
    /// Programs policy.
    pub enforcer: E,
    /// IPAM.
    pub addresses: A,
    /// Announces addresses to the cluster.
    pub announcer: N,
    /// Removes pods' links.
    pub links: LinkRemover,
    /// Deletes conntrack entries of addresses that are assigned or released.
    pub conntrack: Conntrack,
    /// MTU of pods without one in their network configuration.
    pub mtu: watch::Receiver<u32>,
    /// How long ADD waits for policy, unless the network configuration sets it.
    pub policy_timeout: Duration,
}

/// The service.
pub struct Service<E, A, N> {
    parts: ServiceParts<E, A, N>,
    attachments: Mutex<Attachments>,
    /// Locks by pod: calls for one pod run one after the other. An entry is dropped with its last
    /// user.
    pods: Mutex<BTreeMap<EndpointKey, Weak<tokio::sync::Mutex<()>>>>,
}

/// A parsed call.
pub struct CniCall {
    /// Name of the network.
    pub network: String,
    /// The network configuration.
    pub config: Config,
    /// Time limit of the plugin.
    pub timeout_millis: u32,
}

impl<E: Enforcer, A: Addresses, N: Announcer> Service<E, A, N> {
    /// Creates a service with the attachments of earlier runs.
    pub fn new(parts: ServiceParts<E, A, N>, attachments: Attachments) -> Self {
        Self {
            parts,
            attachments: Mutex::new(attachments),
            pods: Mutex::default(),
        }
    }

    /// Attaches a pod. Repeated for the same attachment, it returns the same result.
    pub async fn add(
        &self,
        call: &CniCall,
        asked: &cni::Attachment,
    ) -> Result<cni::Result, CniError> {
        let mut wanted = request::new_attachment(&call.network, asked)?;
        (wanted.mtu, wanted.host_ports) = (call.config.mtu, call.config.host_ports()?);
        let namespace = request::open_namespace(&asked.netns)?;
        let pod = self.pod_lock(&wanted.endpoint());
        let _alone = pod.lock().await;
        let mtu = if call.config.mtu == 0 {
            *self.parts.mtu.borrow()
        } else {
            call.config.mtu
        };
        host_ports::check_free(&self.attachments(), &wanted)?;
        check_interface_free(&self.attachments(), &wanted)?;
        let is_same = |present: &Attachment| present.is_finished && present.netns == asked.netns;
        let present = self.attachments().get(&wanted.id).cloned();
        if let Some(present) = present.filter(is_same)
            && let Ok(mtu) = self
                .check_link(&present, namespace.try_clone().map_err(io_error)?, mtu)
                .await
        {
            self.wait_for_policy(call, &present).await?;
            // An agent that ended right after the first ADD may not have announced it.
            self.parts.announcer.announce(&present);
            return Ok(cni_result(&present, mtu));
        }
        let others = self.attachments().others_on_interface(&wanted);
        for other in others {
            self.detach(&other).await?;
        }
        host_ports::warn_of_useless(&wanted);
        self.record_attachment(&wanted)?;
        match self.set_up(call, &mut wanted, namespace, mtu).await {
            Ok(()) => {
                self.parts.announcer.announce(&wanted);
                Ok(cni_result(&wanted, mtu))
            }
            Err(refusal) => {
                if let Err(error) = self.detach(&wanted).await {
                    tracing::warn!(
                        pod = %wanted.endpoint(),
                        %error,
                        "a failed ADD could not be undone completely; DEL or GC will",
                    );
                }
                Err(refusal)
            }
        }
    }

    /// Detaches a pod: succeeds on any partial state, and on none at all.
    pub async fn del(&self, call: &CniCall, asked: &cni::Attachment) -> Result<(), CniError> {
        let id = request::attachment_id(asked)?;
        let known = self.attachments().get(&id).map(Attachment::endpoint);
        let pod = known
            .or_else(|| request::endpoint(asked))
            .map(|endpoint| self.pod_lock(&endpoint));
        let _alone = match &pod {
            Some(pod) => Some(pod.lock().await),
            None => None,
        };
        // Looked up under the lock: an ADD that held it may have created the attachment.
        let known = self.attachments().get(&id).cloned();
        match known {
            Some(attachment) => self.detach(&attachment).await,
            None => {
                let handle = ipam_handle(&call.network, &id);
                if self
                    .attachments()
                    .iter()
                    .any(|other| other.ipam_handle() == handle)
                {
                    // Another interface of the sandbox owns the handle; ADD refused this one.
                    return Ok(());
                }
                self.delete_connections(
                    self.unowned(&call.config.previous_addresses()),
                    Extent::Whole,
                )
                .await?;
                self.parts
                    .addresses
                    .release(handle)
                    .await
                    .map_err(unavailable_error)
            }
        }
    }

    /// Compares an attachment with the kernel.
    pub async fn check(&self, call: &CniCall, asked: &cni::Attachment) -> Result<(), CniError> {
        let id = request::attachment_id(asked)?;
        let namespace = request::open_namespace(&asked.netns)?;
        let unknown = || {
            CniError::new(
                code::UNKNOWN_CONTAINER,
                format!(
                    "{} of container {} is not attached on this node; run DEL and ADD again",
                    id.ifname, id.container
                ),
            )
        };
        let attachment = self.attachments().get(&id).cloned().ok_or_else(unknown)?;
        let mtu = if call.config.mtu == 0 {
            *self.parts.mtu.borrow()
        } else {
            call.config.mtu
        };
        self.check_link(&attachment, namespace, mtu)
            .await
            .map_err(kernel_error)?;
        self.wait_for_policy(call, &attachment).await
    }

    /// Checks whether ADD can succeed now.
    pub fn status(&self) -> Result<(), CniError> {
        match self.parts.enforcer.not_ready_reason() {
            Some(reason) => Err(CniError::new(code::NOT_AVAILABLE, reason)),
            None => Ok(()),
        }
    }

    /// Detaches all attachments of the network that are not in the list.
    pub async fn gc(&self, call: &CniCall, valid: &[cni::ValidAttachment]) -> Result<(), CniError> {
        let valid: BTreeSet<(&str, &str)> = valid
            .iter()
            .map(|one| (one.container_id.as_str(), one.ifname.as_str()))
            .collect();
        let is_stale = |attachment: &&Attachment| {
            let id = (
                attachment.id.container.as_str(),
                attachment.id.ifname.as_str(),
            );
            attachment.network == call.network && !valid.contains(&id)
        };
        let stale: Vec<Attachment> = self
            .attachments()
            .iter()
            .filter(is_stale)
            .cloned()
            .collect();
        let removals = stale.iter().map(|attachment| async {
            let pod = self.pod_lock(&attachment.endpoint());
            let _alone = pod.lock().await;
            self.detach(attachment).await
        });
        futures::future::join_all(removals)
            .await
            .into_iter()
            .collect()
    }

    async fn set_up(
        &self,
        call: &CniCall,
        wanted: &mut Attachment,
        namespace: File,
        mtu: u32,
    ) -> Result<(), CniError> {
        let [ipv4, ipv6] = call.config.demands()?;
        let (handle, endpoint, exact) = (
            wanted.ipam_handle(),
            wanted.endpoint(),
            call.config.requested_addresses()?,
        );
        let named_by_pod = call.config.names_pools();
        let request = AddressRequest {
            ipv4,
            ipv6,
            named_by_pod,
            exact,
            ..AddressRequest::of_pod(handle, &endpoint)
        };
        let claim = self.parts.addresses.assign(request);
        let mac = pod::pod_mac(&wanted.id.container, &wanted.id.ifname);
        let names = (wanted.interface.clone(), wanted.id.ifname.clone());
        let same = namespace.try_clone().map_err(io_error)?;
        let link = run_blocking(move || {
            let link = PodLink {
                host: &names.0,
                pod: &names.1,
                namespace: &same,
                mtu,
                mac,
            };
            pod::create_link(&mut RouteSocket::open()?, &link)
        });
        let (claimed, index) = tokio::join!(
            claim.instrument(tracing::info_span!("ipam.assign")),
            link.instrument(tracing::info_span!("link.create"))
        );
        wanted.addresses = claimed.map_err(address_error)?;
        let index = index.map_err(kernel_error)?;
        let file = self.attachments().put(wanted.clone()).map_err(io_error)?;

        let (names, addresses) = (
            (wanted.interface.clone(), wanted.id.ifname.clone()),
            wanted.addresses.clone(),
        );
        let configured = run_blocking(move || {
            pod::configure_pod(
                &PodLink {
                    host: &names.0,
                    pod: &names.1,
                    namespace: &namespace,
                    mtu,
                    mac,
                },
                &addresses,
            )
        });
        let synced = run_blocking(move || Ok(file.sync_all()?));
        let (configured, synced, opened) = tokio::join!(
            configured.instrument(tracing::info_span!("link.configure")),
            synced.instrument(tracing::info_span!("attachment.sync")),
            self.open_for_traffic(call, wanted, index)
        );
        configured.map_err(kernel_error)?;
        synced.map_err(kernel_error)?;
        opened?;
        self.attachments().finish(&wanted.id).map_err(io_error)
    }

    /// Writes the attachment before anything is created for it, so that a crash leaves nothing
    /// unknown.
    fn record_attachment(&self, wanted: &Attachment) -> Result<(), CniError> {
        let mut attachments = self.attachments();
        // Checked again: another pod may have taken the interface or a host port while earlier
        // sandboxes were removed.
        host_ports::check_free(&attachments, wanted)?;
        check_interface_free(&attachments, wanted)?;
        attachments.put(wanted.clone()).map(drop).map_err(io_error)
    }

    /// Opens the link for the pod's traffic. First the addresses are routed to the link, which
    /// carries nothing yet, then conntrack entries of their former owners are deleted, and only
    /// then is policy programmed: a packet either meets no policy and is dropped, or starts a new
    /// connection. Without the route, packets could leave by another link meanwhile and create
    /// entries.
    async fn open_for_traffic(
        &self,
        call: &CniCall,
        wanted: &Attachment,
        index: u32,
    ) -> Result<(), CniError> {
        self.parts
            .enforcer
            .link_made(wanted.interface.clone(), index, wanted.attached())
            .await;
        let addresses = wanted.addresses.clone();
        let routed =
            run_blocking(move || pod::add_routes(&mut RouteSocket::open()?, index, &addresses));
        routed
            .instrument(tracing::info_span!("link.route"))
            .await
            .map_err(kernel_error)?;
        self.delete_connections(
            wanted.addresses.iter().map(IpNet::addr).collect(),
            Extent::Link,
        )
        .await?;
        self.wait_for_policy(call, wanted).await?;
        self.delete_untranslated(wanted).await
    }

    /// Deletes the conntrack entries of these addresses, none of which belongs to a pod now.
    async fn delete_connections(
        &self,
        addresses: Vec<IpAddr>,
        extent: Extent,
    ) -> Result<(), CniError> {
        let purged = self.parts.conntrack.purge(addresses.clone(), extent);
        let refusal = |error: TableError| {
            let addresses: Vec<String> = addresses.iter().map(IpAddr::to_string).collect();
            CniError::new(
                code::TRY_AGAIN,
                format!(
                    "conntrack entries of {} could not be deleted, and established connections \
                     would bypass policy: {error}",
                    addresses.join(" and ")
                ),
            )
        };
        purged
            .instrument(tracing::info_span!("conntrack.purge"))
            .await
            .map_err(refusal)
    }

    /// Waits until the pod's policy is in the kernel. It fails closed when that takes too long, and
    /// the runtime retries.
    async fn wait_for_policy(
        &self,
        call: &CniCall,
        attachment: &Attachment,
    ) -> Result<(), CniError> {
        let configured = match call.config.policy_setup_timeout_seconds {
            0 => self.parts.policy_timeout,
            seconds => Duration::from_secs(seconds),
        };
        let limit = request::time_limit(call.timeout_millis, configured);
        let attach = self
            .parts
            .enforcer
            .attach(attachment.interface.clone(), attachment.attached());
        match tokio::time::timeout(
            limit,
            attach.instrument(tracing::info_span!("policy.attach")),
        )
        .await
        {
            Ok(Ok(())) => Ok(()),
            Ok(Err(error)) => Err(CniError::new(code::TRY_AGAIN, error.to_string())),
            Err(_) => {
                let reason = self.parts.enforcer.not_ready_reason().unwrap_or_else(|| {
                    "typha has not sent the policy of this pod, whose UID may be new".to_owned()
                });
                Err(CniError::new(
                    code::TRY_AGAIN,
                    format!(
                        "policy of {} was not in force within {limit:?}: {reason}; see the logs of \
                         margay-typha and of the agent",
                        attachment.endpoint()
                    ),
                ))
            }
        }
    }

    /// Removes an attachment. The order matters: first the pod leaves policy, so that its link
    /// passes nothing any more; then its conntrack entries are deleted, which no packet can create
    /// again; its address is released last, so that nobody gets it while it is in use. The link may
    /// go later: the next owner of the address on this node takes over its route.
    async fn detach(&self, attachment: &Attachment) -> Result<(), CniError> {
        let shared = self
            .attachments()
            .others_on_interface(attachment)
            .iter()
            .any(|other| !other.addresses.is_empty());
        if !shared {
            let (endpoint, host) = (attachment.endpoint(), attachment.interface.clone());
            let policy = self.parts.enforcer.detach(endpoint, host.clone());
            if !policy
                .instrument(tracing::info_span!("policy.detach"))
                .await
            {
                let link = self
                    .parts
                    .links
                    .remove(host.clone())
                    .instrument(tracing::info_span!("link.remove"));
                link.await.map_err(|error| kernel_error(error.into()))?;
            }
        }
        self.delete_connections(self.addresses_only_of(attachment), Extent::Whole)
            .await?;
        self.parts
            .addresses
            .release(attachment.ipam_handle())
            .await
            .map_err(unavailable_error)?;
        let leftover = self
            .attachments()
            .retire(&attachment.id)
            .map_err(io_error)?;
        if !shared {
            self.parts.announcer.withdraw(attachment);
        }
        match leftover {
            Some(leftover) if shared => leftover.forget().map_err(io_error),
            Some(leftover) => self.remove_leftover(leftover).await,
            None => Ok(()),
        }
    }

    /// Addresses of an attachment that no other attachment has.
    fn addresses_only_of(&self, attachment: &Attachment) -> Vec<IpAddr> {
        let attachments = self.attachments();
        let others = attachments.iter().filter(|other| other.id != attachment.id);
        let held: BTreeSet<IpNet> = others
            .flat_map(|other| other.addresses.iter().copied())
            .collect();
        attachment
            .addresses
            .iter()
            .filter(|address| !held.contains(address))
            .map(IpNet::addr)
            .collect()
    }

    /// Addresses of these that no attachment has.
    fn unowned(&self, addresses: &[IpAddr]) -> Vec<IpAddr> {
        let attachments = self.attachments();
        let held: BTreeSet<IpAddr> = attachments
            .iter()
            .flat_map(|attachment| attachment.addresses.iter().map(IpNet::addr))
            .collect();
        addresses
            .iter()
            .copied()
            .filter(|address| !held.contains(address))
            .collect()
    }

    async fn check_link(
        &self,
        attachment: &Attachment,
        namespace: File,
        mtu: u32,
    ) -> Result<u32, PodError> {
        let attachment = attachment.clone();
        run_blocking(move || {
            let (host, pod) = (&attachment.interface, &attachment.id.ifname);
            let link = PodLink {
                host,
                pod,
                namespace: &namespace,
                mtu,
                mac: pod::pod_mac(&attachment.id.container, pod),
            };
            pod::check_link(&mut RouteSocket::open()?, &link, &attachment.addresses)
        })
        .await
    }

    fn attachments(&self) -> MutexGuard<'_, Attachments> {
        self.attachments.lock()
    }

    fn pod_lock(&self, endpoint: &EndpointKey) -> Arc<tokio::sync::Mutex<()>> {
        let mut pods = self.pods.lock();
        pods.retain(|_, lock| lock.strong_count() > 0);
        if let Some(lock) = pods.get(endpoint).and_then(Weak::upgrade) {
            return lock;
        }
        let lock = Arc::new(tokio::sync::Mutex::new(()));
        pods.insert(endpoint.clone(), Arc::downgrade(&lock));
        lock
    }
}

/// Fails if another pod (their names have the same hash), or the same sandbox, has the interface;
/// earlier sandboxes of the pod are replaced.
fn check_interface_free(attachments: &Attachments, wanted: &Attachment) -> Result<(), CniError> {
    for other in attachments.others_on_interface(wanted) {
        let (interface, pod) = (&wanted.interface, wanted.endpoint());
        if other.endpoint() != pod {
            let text = format!(
                "interface {interface} of pod {pod} is already used by pod {} on this node, as \
                 their names have the same hash; rename one of them",
                other.endpoint()
            );
            return Err(CniError::new(code::TRY_AGAIN, text));
        }
        if other.id.container == wanted.id.container {
            let text = format!(
                "CNI_IFNAME is {:?}: pod {pod} is attached by {} already, and this network \
                 supports one interface per pod; remove it from the pod's list of additional \
                 networks",
                wanted.id.ifname, other.id.ifname
            );
            return Err(CniError::new(code::INVALID_ENVIRONMENT, text));
        }
    }
    Ok(())
}

async fn run_blocking<T: Send + 'static>(
    work: impl FnOnce() -> Result<T, PodError> + Send + 'static,
) -> Result<T, PodError> {
    match tokio::task::spawn_blocking(work).await {
        Ok(result) => result,
        Err(panic) => Err(PodError::Missing(format!(
            "the request to the kernel panicked: {panic}"
        ))),
    }
}

mod host_ports;
mod mtu;
mod recovery;
mod response;
#[cfg(test)]
mod tests;
