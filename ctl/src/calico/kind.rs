//! Kinds by the names that calicoctl takes.

use anyhow::{Result, bail};
use margay_api::storage::{Kind, kind};

/// Short names, from calicoctl.
const SHORT: [(&str, &[&str]); 17] = [
    ("BGPConfiguration", &["bgpconfig", "bgpconfigs"]),
    ("BGPFilter", &[]),
    ("BGPPeer", &["bgpp", "bgpps", "bp", "bps"]),
    ("CalicoNodeStatus", &[]),
    ("ClusterInformation", &["clusterinfo", "clusterinfos"]),
    ("FelixConfiguration", &["felixconfig", "felixconfigs"]),
    ("GlobalNetworkPolicy", &["gnp", "gnps"]),
    ("GlobalNetworkSet", &[]),
    ("HostEndpoint", &["hep", "heps"]),
    ("IPPool", &["ipp", "ipps", "pool", "pools"]),
    (
        "KubeControllersConfiguration",
        &["kubecontrollersconfig", "kubecontrollersconfigs"],
    ),
    (
        "NetworkPolicy",
        &["policy", "np", "policies", "pol", "pols"],
    ),
    ("NetworkSet", &["netset", "netsets"]),
    ("StagedGlobalNetworkPolicy", &["sgnp", "sgnps"]),
    (
        "StagedKubernetesNetworkPolicy",
        &["skpol", "skpols", "sknp"],
    ),
    (
        "StagedNetworkPolicy",
        &["stagedpolicy", "snp", "stagedpolicies", "spol", "spols"],
    ),
    ("Tier", &[]),
];
/// Maximal number of edits in a misspelt name.
const MISSPELT: usize = 3;

/// Finds a kind by its name, its plural or a short name, in whatever case.
pub fn find(text: &str) -> Result<&'static Kind> {
    let wanted = text.to_lowercase();
    let short = SHORT
        .iter()
        .find(|(_, names)| names.contains(&wanted.as_str()));
    let short = short.and_then(|(kind, _)| Kind::of(kind));
    let is_named = |kind: &&Kind| kind.kind.to_lowercase() == wanted || kind.plural == wanted;
    if let Some(kind) = short.or_else(|| kind::ALL.iter().find(is_named)) {
        return Ok(kind);
    }
    let names = kind::ALL.iter().map(|kind| kind.kind.to_lowercase());
    let nearest = names
        .map(|name| (strsim::osa_distance(&name, &wanted), name))
        .min();
    match nearest.filter(|(edits, _)| *edits <= MISSPELT) {
        Some((_, name)) => bail!("{text:?}: not one of Calico's kinds; did you mean {name}?"),
        None => bail!("{text:?}: not one of Calico's kinds; kubectl has all others"),
    }
}

/// Finds the kind of an object, given in the users' form.
pub fn of(object: &serde_json::Value) -> Result<&'static Kind> {
    let text = |field: &str| object[field].as_str().unwrap_or_default();
    if text("apiVersion") != "projectcalico.org/v3" {
        bail!(
            "apiVersion: {:?}: must be projectcalico.org/v3; kubectl has all other kinds",
            text("apiVersion")
        );
    }
    match Kind::of(text("kind")) {
        Some(kind) => Ok(kind),
        None => bail!(
            "kind: {:?}: not one of Calico's kinds; correct it",
            text("kind")
        ),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn kinds_are_found_by_all_of_their_names() {
        for name in [
            "GlobalNetworkPolicy",
            "globalnetworkpolicies",
            "gnp",
            "GNPS",
        ] {
            assert_eq!(
                find(name).expect("a kind").kind,
                "GlobalNetworkPolicy",
                "{name}"
            );
        }
        let message = find("ipool").expect_err("misspelt").to_string();
        assert!(message.ends_with("did you mean ippool?"), "{message}");
        assert!(SHORT.iter().all(|(kind, _)| Kind::of(kind).is_some()));
    }
}
