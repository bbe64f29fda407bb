//! `version`: of this program, and of the cluster.

use anyhow::{Context, Result};
use margay_api::storage::Kind;
use serde_json::Value;

use crate::live::{self, Connection, ConnectionArgs};
use crate::output::Finding;

/// Arguments of the command.
#[derive(Clone, Debug, clap::Args)]
pub struct Args {
    /// Only that of this program.
    #[arg(long)]
    pub client: bool,
    /// The cluster.
    #[command(flatten)]
    pub connection: ConnectionArgs,
}

/// Runs the command.
pub fn run(args: &Args) -> Result<Finding> {
    let mut text = format!("Client Version:    v{}\n", env!("CARGO_PKG_VERSION"));
    if !args.client {
        text += &live::block_on(async {
            let cluster = Connection::open(&args.connection).await?;
            let kind = Kind::of("ClusterInformation").context("one of Calico's kinds")?;
            let found = cluster.find(kind, None, "default").await?;
            Ok(of_cluster(found.map(|found| found.object).as_ref()))
        })?;
    }
    Ok(Finding { text, holds: true })
}

fn of_cluster(information: Option<&Value>) -> String {
    let Some(information) = information else {
        return "Cluster Version:   unknown: there is no ClusterInformation\n".to_owned();
    };
    let text = |field: &str| information["spec"][field].as_str().unwrap_or("unknown");
    format!(
        "Cluster Version:   {}\nCluster Type:      {}\n",
        text("calicoVersion"),
        text("clusterType")
    )
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn versions_are_shown() {
        let information = json!({"spec": {"calicoVersion": "v3.32.0", "clusterType": "k8s"}});
        let text = of_cluster(Some(&information));
        assert_eq!(text, "Cluster Version:   v3.32.0\nCluster Type:      k8s\n");
        assert!(of_cluster(None).contains("unknown"));
    }
}
