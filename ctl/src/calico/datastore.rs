//! `datastore migrate lock` and `unlock`: while Calico's data is locked no pod gets an address.

use anyhow::{Context, Result, bail};
use clap::Subcommand;
use margay_api::storage::Kind;
use serde_json::Value;

use crate::live::{self, Connection, ConnectionArgs};
use crate::output::Finding;

/// A command about the data as a whole.
#[derive(Clone, Debug, Subcommand)]
pub enum Command {
    /// Locks and unlocks the data.
    #[command(subcommand)]
    Migrate(Migrate),
}

/// A command that goes with a migration.
#[derive(Clone, Debug, Subcommand)]
pub enum Migrate {
    /// Locks the data: until it is unlocked no new pod starts.
    Lock(ConnectionArgs),
    /// Unlocks the data.
    Unlock(ConnectionArgs),
}

/// Runs a command.
pub fn run(command: &Command) -> Result<Finding> {
    let Command::Migrate(command) = command;
    let (is_ready, connection) = match command {
        Migrate::Lock(connection) => (false, connection),
        Migrate::Unlock(connection) => (true, connection),
    };
    let text = live::block_on(async {
        let cluster = Connection::open(connection).await?;
        let kind = Kind::of("ClusterInformation").context("one of Calico's kinds")?;
        let Some(found) = cluster.find(kind, None, "default").await? else {
            bail!("there is no ClusterInformation default: nothing has been installed here");
        };
        match marked(&found.object, is_ready) {
            Some(object) => {
                cluster.replace(kind, &found, object).await?;
                Ok(if is_ready {
                    "Datastore unlocked.\n"
                } else {
                    "Datastore locked.\n"
                })
            }
            None => Ok(if is_ready {
                "Datastore is not locked.\n"
            } else {
                "Datastore is locked already.\n"
            }),
        }
    })?;
    Ok(Finding {
        text: text.to_owned(),
        holds: true,
    })
}

/// The ClusterInformation with that mark; `None` if it has it.
fn marked(information: &Value, is_ready: bool) -> Option<Value> {
    let present = information["spec"]["datastoreReady"]
        .as_bool()
        .unwrap_or(true);
    let mut object = information.clone();
    object["spec"]["datastoreReady"] = is_ready.into();
    (present != is_ready).then_some(object)
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn the_mark_is_changed_once() {
        let unlocked = json!({"spec": {"clusterType": "k8s"}});
        assert_eq!(marked(&unlocked, true), None);
        let locked = marked(&unlocked, false).expect("a change");
        assert_eq!(
            locked,
            json!({"spec": {"clusterType": "k8s", "datastoreReady": false}})
        );
        assert_eq!(marked(&locked, false), None);
        assert_eq!(
            marked(&locked, true).expect("a change")["spec"]["datastoreReady"],
            true
        );
    }
}
