//! Threads that report external changes to the agent: of our table, and of the node's addresses.

use std::io;
use std::thread;

use margay_dataplane::Links;
use margay_dataplane::nftables::TableWatch;
use margay_dataplane::routes::addresses::AddressWatch;

use crate::agent::{AgentEvent, AgentHandle};

/// Reports changes of our table by other programs, from a thread that ends with the agent.
pub fn watch_drift(mut table: TableWatch, agent: AgentHandle) -> io::Result<()> {
    // A strong sender would keep the agent alive.
    let events = agent.events.downgrade();
    drop(agent);
    let work = move || loop {
        if let Err(error) = table.wait() {
            tracing::warn!(
                %error,
                "the nftables monitor failed; changes of our table by other programs are found by \
                 the periodic check only",
            );
            return;
        }
        let Some(events) = events.upgrade() else {
            return;
        };
        if events.blocking_send(AgentEvent::Drift).is_err() {
            return;
        }
    };
    thread::Builder::new()
        .name("nft-monitor".to_owned())
        .spawn(work)
        .map(|_| ())
}

/// Reports changed addresses of the node, from a thread that ends with the agent. `known` are those
/// that the agent has; `look` sees all addresses, `known` included.
pub fn watch_links(
    mut addresses: AddressWatch,
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
                tracing::error!(
                    %error,
                    "the address monitor failed: host endpoints no longer follow the node's \
                     addresses; restart the agent",
                );
                return;
            }
        };
        let Some(events) = events.upgrade() else {
            return;
        };
        if links == known {
            continue;
        }
        look(&links);
        known.clone_from(&links);
        if events.blocking_send(AgentEvent::Links(links)).is_err() {
            return;
        }
    };
    thread::Builder::new()
        .name("addresses".to_owned())
        .spawn(work)
        .map(|_| ())
}
