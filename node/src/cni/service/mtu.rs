//! Pods that are there follow an MTU that becomes smaller.

use std::path::Path;

use margay_api::endpoint::EndpointKey;
use tokio::sync::watch;

use super::{Service, blocking};
use crate::cni::attachment::Attachment;
use crate::cni::ports::{Announcer, Enforcer};
use margay_dataplane::routes::pod::{self, PodError, PodLink};
use margay_dataplane::routes::sysctl;
use margay_ipam::request::Addresses;
use margay_netlink::namespace;
use margay_netlink::route::RouteSocket;

impl<E: Enforcer, A: Addresses, N: Announcer> Service<E, A, N> {
    /// Gives links of pods whose MTU is larger this one, each time that it changes; none: it is not known yet. Those whose network configuration has an MTU
    /// keep that. A larger one is for new pods: one that is there may have chosen a smaller MTU itself.
    pub async fn follow_mtu(&self, mut lasting: watch::Receiver<Option<u32>>) {
        loop {
            let mtu = *lasting.borrow_and_update();
            if let Some(mtu) = mtu {
                self.lower_mtu(mtu).await;
            }
            if lasting.changed().await.is_err() {
                return;
            }
        }
    }

    async fn lower_mtu(&self, mtu: u32) {
        let attached: Vec<Attachment> =
            self.attachments().iter().filter(|attachment| attachment.mtu == 0).cloned().collect();
        let mut lowered = 0;
        for Attachment { id, namespace, pod, .. } in attached {
            let endpoint = EndpointKey::new(namespace, pod);
            // An ADD under way has the MTU of its start.
            let pod = self.pod(&endpoint);
            let _alone = pod.lock().await;
            let Some(attachment) = self.attachments().get(&id).cloned() else { continue };
            match blocking(move || lower(&attachment, mtu)).await {
                Ok(was_larger) => lowered += usize::from(was_larger),
                Err(error) => tracing::warn!(
                    pod = %endpoint, %error, mtu,
                    "the link of a pod keeps an MTU that is larger than what the node's link carries; make the pod anew"
                ),
            }
        }
        if lowered > 0 {
            tracing::info!(mtu, pods = lowered, "links of pods had a larger MTU than the node's link has room for");
        }
    }
}

/// Whether it was larger. A pod that has gone needs nothing.
fn lower(attachment: &Attachment, mtu: u32) -> Result<bool, PodError> {
    let namespace = match namespace::open(Path::new(&attachment.netns)) {
        Ok(namespace) => namespace,
        Err(error) if matches!(error.kind(), std::io::ErrorKind::NotFound | std::io::ErrorKind::InvalidInput) => {
            return Ok(false);
        }
        Err(error) => return Err(error.into()),
    };
    let has_ipv6 = attachment.addresses.iter().any(|address| address.addr().is_ipv6());
    let mtu = if has_ipv6 { mtu.max(sysctl::IPV6_MTU) } else { mtu };
    let (host, inside) = (&attachment.interface, &attachment.id.ifname);
    let mac = pod::mac(&attachment.id.container, inside);
    pod::lower_mtu(&mut RouteSocket::open()?, &PodLink { host, pod: inside, namespace: &namespace, mtu, mac })
}
