//! What an earlier run left: unfinished ADDs, links of detached pods, and connections of pods that
//! are gone.

use margay_dataplane::routes::conntrack::Extent;
use margay_dataplane::routes::present;
use margay_dataplane::routes::removal;
use margay_ipam::request::Addresses;
use margay_netlink::route::RouteSocket;

use crate::cni::attachment::{Attachment, Leftover};
use crate::cni::ports::{Announcer, Enforcer};
use crate::cni::request::CniError;

use super::response::io_error;
use super::{Service, run_blocking};

impl<E: Enforcer, A: Addresses, N: Announcer> Service<E, A, N> {
    /// Undoes ADDs that an earlier run did not finish, none of which got a response, and deletes
    /// the conntrack entries of pods that went while no agent ran; their DEL is still to come.
    pub async fn recover(&self) {
        self.recover_leftovers().await;
        self.delete_gone_connections().await;
        let unfinished: Vec<Attachment> = self
            .attachments()
            .iter()
            .filter(|attachment| !attachment.is_finished)
            .cloned()
            .collect();
        for attachment in unfinished {
            let pod = self.pod_lock(&attachment.endpoint());
            let _alone = pod.lock().await;
            let is_still_unfinished = self
                .attachments()
                .get(&attachment.id)
                .is_some_and(|present| !present.is_finished);
            if !is_still_unfinished {
                continue;
            }
            if let Err(error) = self.detach(&attachment).await {
                tracing::warn!(
                    pod = %attachment.endpoint(),
                    %error,
                    "an unfinished ADD could not be undone; DEL or GC will",
                );
            }
        }
    }

    /// Deletes the conntrack entries of attachments whose links went with their pods.
    async fn delete_gone_connections(&self) {
        let links = match run_blocking(|| Ok(present::list_links(&mut RouteSocket::open()?)?)).await
        {
            Ok(links) => links,
            Err(error) => {
                return tracing::warn!(
                    %error,
                    "links cannot be listed; DEL deletes the conntrack entries of pods that are \
                     gone",
                );
            }
        };
        let gone: Vec<Attachment> = self
            .attachments()
            .iter()
            .filter(|attachment| {
                !attachment.addresses.is_empty() && !links.contains_key(&attachment.interface)
            })
            .cloned()
            .collect();
        let purges = gone.iter().map(|attachment| async {
            let pod = self.pod_lock(&attachment.endpoint());
            let _alone = pod.lock().await;
            if let Err(error) = self
                .delete_connections(self.addresses_only_of(attachment), Extent::Whole)
                .await
            {
                tracing::warn!(
                    pod = %attachment.endpoint(),
                    %error,
                    "conntrack entries of a pod that is gone could not be deleted; DEL will",
                );
            }
        });
        futures::future::join_all(purges).await;
    }

    /// Starts the removal of a detached pod's link, which carries nothing any more. Where that
    /// fails, the file remains for the next start.
    pub(super) async fn remove_leftover(&self, leftover: Leftover) -> Result<(), CniError> {
        let (links, enforcer) = (self.parts.links.clone(), self.parts.enforcer.clone());
        let Some(index) = removal::link_index(&leftover.interface) else {
            enforcer.link_gone(leftover.interface.clone(), None).await;
            return leftover.forget().map_err(io_error);
        };
        tokio::spawn(async move {
            let gone = match links.wait_or_remove(index).await {
                Ok(()) => {
                    enforcer
                        .link_gone(leftover.interface.clone(), Some(index))
                        .await;
                    leftover.forget().map_err(|error| error.to_string())
                }
                Err(error) => Err(error.to_string()),
            };
            if let Err(error) = gone {
                tracing::warn!(
                    interface = leftover.interface,
                    error,
                    "the link of a detached pod could not be removed; it carries nothing"
                );
            }
        });
        Ok(())
    }

    /// Removes links of detached pods that an earlier run left.
    async fn recover_leftovers(&self) {
        let leftovers = self.attachments().take_leftovers();
        for leftover in leftovers {
            let interface = leftover.interface.clone();
            let is_in_use = self
                .attachments()
                .iter()
                .any(|attachment| attachment.interface == interface);
            let result = if is_in_use {
                leftover.forget().map_err(io_error)
            } else {
                self.remove_leftover(leftover).await
            };
            if let Err(error) = result {
                tracing::warn!(
                    interface,
                    %error,
                    "the file that records the link of a detached pod could not be removed",
                );
            }
        }
    }
}
