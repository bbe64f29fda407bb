//! Lowers the MTU of existing pods' links when the node's becomes smaller.

use std::path::Path;

use margay_api::endpoint::EndpointKey;
use tokio::sync::watch;

use super::{Service, run_blocking};
use crate::cni::attachment::Attachment;
use crate::cni::ports::{Announcer, Enforcer};
use margay_dataplane::routes::pod::{self, PodError, PodLink};
use margay_dataplane::routes::sysctl;
use margay_ipam::request::Addresses;
use margay_netlink::namespace;
use margay_netlink::route::RouteSocket;

impl<E: Enforcer, A: Addresses, N: Announcer> Service<E, A, N> {
    /// Lowers pods' links to each new MTU; `None`: it is not known yet. Pods whose network
    /// configuration has an MTU keep it. A larger MTU applies to new pods only: an existing one may
    /// have chosen a smaller MTU itself.
    pub async fn follow_mtu(&self, mut known: watch::Receiver<Option<u32>>) {
        loop {
            let mtu = *known.borrow_and_update();
            if let Some(mtu) = mtu {
                self.lower_mtu(mtu).await;
            }
            if known.changed().await.is_err() {
                return;
            }
        }
    }

    async fn lower_mtu(&self, mtu: u32) {
        let attached: Vec<Attachment> = self
            .attachments()
            .iter()
            .filter(|attachment| attachment.mtu == 0)
            .cloned()
            .collect();
        let mut lowered = 0;
        for Attachment {
            id, namespace, pod, ..
        } in attached
        {
            let endpoint = EndpointKey::new(namespace, pod);
            // An ADD in progress uses the MTU of its start.
            let pod = self.pod_lock(&endpoint);
            let _alone = pod.lock().await;
            let Some(attachment) = self.attachments().get(&id).cloned() else {
                continue;
            };
            match run_blocking(move || lower_link(&attachment, mtu)).await {
                Ok(was_larger) => lowered += usize::from(was_larger),
                Err(error) => tracing::warn!(
                    pod = %endpoint, %error, mtu,
                    "the MTU of a pod's link could not be lowered, and the node's link drops \
                     larger packets; recreate the pod"
                ),
            }
        }
        if lowered > 0 {
            tracing::info!(
                mtu,
                pods = lowered,
                "lowered the MTU of pods' links to what the node's link carries"
            );
        }
    }
}

/// Lowers the MTU of an attachment's link and returns whether it was larger. A pod that is gone
/// needs nothing.
fn lower_link(attachment: &Attachment, mtu: u32) -> Result<bool, PodError> {
    let namespace = match namespace::open(Path::new(&attachment.netns)) {
        Ok(namespace) => namespace,
        Err(error)
            if matches!(
                error.kind(),
                std::io::ErrorKind::NotFound | std::io::ErrorKind::InvalidInput
            ) =>
        {
            return Ok(false);
        }
        Err(error) => return Err(error.into()),
    };
    let has_ipv6 = attachment
        .addresses
        .iter()
        .any(|address| address.addr().is_ipv6());
    let mtu = if has_ipv6 {
        mtu.max(sysctl::IPV6_MTU)
    } else {
        mtu
    };
    let (host, inside) = (&attachment.interface, &attachment.id.ifname);
    let mac = pod::pod_mac(&attachment.id.container, inside);
    pod::lower_mtu(
        &mut RouteSocket::open()?,
        &PodLink {
            host,
            pod: inside,
            namespace: &namespace,
            mtu,
            mac,
        },
    )
}
