//! Limits of the assignment of addresses, kept up to date by watches.

use std::collections::BTreeMap;
use std::sync::Arc;

use margay_api::ipam::limits::Limits;
use margay_api::v3::{ClusterInformation, IPAMConfiguration, IPReservation, SINGLETON};
use tokio::sync::watch;

use super::pools::Listed;

/// The limits; `None` until all objects that they come from have been listed.
pub type KnownLimits = Option<Arc<Limits>>;

/// Follows the limits that these objects set.
pub fn follow(
    configurations: watch::Receiver<Listed<IPAMConfiguration>>,
    reservations: watch::Receiver<Listed<IPReservation>>,
    informations: watch::Receiver<Listed<ClusterInformation>>,
) -> watch::Receiver<KnownLimits> {
    let (sender, receiver) = watch::channel(None);
    tokio::spawn(run(
        Sources {
            configurations,
            reservations,
            informations,
        },
        sender,
    ));
    receiver
}

struct Sources {
    configurations: watch::Receiver<Listed<IPAMConfiguration>>,
    reservations: watch::Receiver<Listed<IPReservation>>,
    informations: watch::Receiver<Listed<ClusterInformation>>,
}

async fn run(mut sources: Sources, sender: watch::Sender<KnownLimits>) {
    let mut logged = Vec::new();
    loop {
        if let Some((limits, problems)) = sources.limits() {
            problems
                .iter()
                .filter(|problem| !logged.contains(*problem))
                .for_each(|problem| tracing::warn!("{problem}"));
            logged = problems;
            sender.send_if_modified(|present| {
                let differs = present.as_deref() != Some(&limits);
                if differs {
                    *present = Some(Arc::new(limits));
                }
                differs
            });
        }
        let changed = tokio::select! {
            changed = sources.configurations.changed() => changed,
            changed = sources.reservations.changed() => changed,
            changed = sources.informations.changed() => changed,
        };
        if changed.is_err() {
            return;
        }
    }
}

impl Sources {
    fn limits(&mut self) -> Option<(Limits, Vec<String>)> {
        let configurations = self.configurations.borrow_and_update().clone()?;
        let informations = self.informations.borrow_and_update().clone()?;
        let reservations = self.reservations.borrow_and_update().clone()?;
        let reservations: BTreeMap<_, _> = reservations
            .iter()
            .map(|(name, object)| (name.clone(), object.spec.clone()))
            .collect();
        let configuration = configurations.get(SINGLETON).map(|object| &object.spec);
        let information = informations.get(SINGLETON).map(|object| &object.spec);
        Some(Limits::new(configuration, &reservations, information))
    }
}
