//! Threads that tell the agent what others change: our table, and the addresses of the node.

use std::io;
use std::thread;

use margay_dataplane::Links;
use margay_dataplane::nftables::Watch;
use margay_dataplane::routes::addresses::Addresses;

use crate::agent::{AgentHandle, Event};

/// Tells the agent of every change by others, from a thread that ends with the agent.
pub fn watch_drift(mut table: Watch, agent: AgentHandle) -> io::Result<()> {
    // Its sender would keep the agent alive.
    let events = agent.events.downgrade();
    drop(agent);
    let work = move || loop {
        if let Err(error) = table.wait() {
            tracing::warn!(%error, "changes of our table by others are found by the periodic check only");
            return;
        }
        let Some(events) = events.upgrade() else { return };
        if events.blocking_send(Event::Drift).is_err() {
            return;
        }
    };
    thread::Builder::new().name("nft-monitor".to_owned()).spawn(work).map(|_| ())
}

/// Tells the agent of other addresses of the node, from a thread that ends with the agent. `known` is what it has been told. `look` sees what it is
/// told, also at first.
pub fn watch_links(
    mut addresses: Addresses,
    mut known: Links,
    agent: AgentHandle,
    look: impl Fn(&Links) + Send + 'static,
) -> io::Result<()> {
    look(&known);
    let events = agent.events.downgrade();
    drop(agent);
    let work = move || loop {
        let links = addresses.wait().and_then(|()| addresses.read());
        let links = match links {
            Ok(links) => links,
            Err(error) => {
                tracing::error!(%error, "host endpoints do not follow the node's addresses any more; restart the agent");
                return;
            }
        };
        let Some(events) = events.upgrade() else { return };
        if links == known {
            continue;
        }
        look(&links);
        known.clone_from(&links);
        if events.blocking_send(Event::Links(links)).is_err() {
            return;
        }
    };
    thread::Builder::new().name("addresses".to_owned()).spawn(work).map(|_| ())
}
