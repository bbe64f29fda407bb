//! Network configurations in a node's folder: which of them its container runtime takes, and whose that is. Installer and agent have to agree on it.

use std::collections::BTreeMap;
use std::fmt;

use serde_json::Value;

/// Name of the plugin in the binary folder, which is its `type` in a configuration.
pub const PLUGIN: &str = "margay";
/// Name of our configuration. Runtimes take the first one by name.
pub const CONFLIST: &str = "10-margay.conflist";
/// Put behind the name of a configuration that is set aside, so that no runtime reads it.
pub const SAVED: &str = ".margay-saved";
/// Ends of the names that runtimes read.
const READ: [&str; 3] = [".conf", ".conflist", ".json"];
/// Plugins that call the others that a cluster has, among them ours.
const CALLERS: [&str; 3] = ["multus", "multus-cni", "multus-shim"];

/// Networks that leave their configuration behind: name, what their files' names begin with, and the types of their plugins.
static NETWORKS: [(&str, &str, &[&str]); 8] = [
    ("Canal", "10-canal", &[]),
    ("Calico", "10-calico", &["calico"]),
    ("flannel", "10-flannel", &["flannel"]),
    ("kindnet", "10-kindnet", &[]),
    ("Weave Net", "10-weave", &["weave-net"]),
    ("Cilium", "05-cilium", &["cilium-cni"]),
    ("Antrea", "10-antrea", &["antrea"]),
    ("kube-router", "10-kuberouter", &[]),
];

/// Whose a configuration is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Whose {
    /// It calls our plugin, or a plugin that does.
    Ours,
    /// Nothing is in it; runtimes pass over it.
    Nobodys,
    /// What is left of that network.
    Left(&'static str),
    /// Somebody else's: what it calls, or why a runtime cannot use it.
    Foreign(String),
}

/// Whether runtimes read a file of that name.
pub fn is_read(name: &str) -> bool {
    READ.iter().any(|suffix| name.ends_with(suffix))
}

/// Whose the configuration in that file is.
pub fn whose(name: &str, content: &str) -> Whose {
    if content.trim().is_empty() {
        return Whose::Nobodys;
    }
    let parsed = serde_json::from_str::<Value>(content);
    let mut types = Vec::new();
    if let Ok(configuration) = &parsed {
        collect_types(configuration, &mut types);
    }
    if types.iter().any(|kind| *kind == PLUGIN || CALLERS.contains(kind)) {
        return Whose::Ours;
    }
    let is_of = |(_, begin, plugins): &&(&str, &str, &[&str])| {
        name.starts_with(begin) || types.iter().any(|kind| plugins.contains(kind))
    };
    match (NETWORKS.iter().find(is_of), &parsed) {
        (Some((network, ..)), _) => Whose::Left(network),
        (None, Err(error)) => Whose::Foreign(format!("is not JSON, {error}")),
        (None, Ok(_)) if types.is_empty() => Whose::Foreign("names no plugin".to_owned()),
        (None, Ok(_)) => Whose::Foreign(format!("calls {}", types.join(", "))),
    }
}

/// Every plugin that a configuration names, at whatever depth: callers hold configurations of others.
fn collect_types<'a>(value: &'a Value, types: &mut Vec<&'a str>) {
    match value {
        Value::Object(fields) => {
            types.extend(fields.get("type").and_then(Value::as_str));
            fields.values().for_each(|below| collect_types(below, types));
        }
        Value::Array(list) => list.iter().for_each(|below| collect_types(below, types)),
        _ => {}
    }
}

/// Why the runtime does not call our plugin.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Bypass {
    /// Our configuration is not there.
    Missing,
    /// That file is before it.
    Before {
        /// Its name.
        name: String,
        /// What is wrong with it.
        what: String,
    },
}

impl fmt::Display for Bypass {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Missing => write!(
                f,
                "{CONFLIST} is not in the folder of network configurations, so pods that start get no network; delete this node's pod of the agent, \
                 whose successor writes it"
            ),
            Self::Before { name, what } => write!(
                f,
                "the container runtime takes {name} of the folder of network configurations before {CONFLIST}, and it {what}: pods that start are not \
                 in Margay's network, or do not start; remove the file, or have it call the plugin {PLUGIN}"
            ),
        }
    }
}

/// Why the runtime of a node with these files, by name, does not call our plugin; none if it does.
pub fn bypass(files: &BTreeMap<String, String>) -> Option<Bypass> {
    for (name, content) in files.iter().filter(|(name, _)| is_read(name)) {
        let what = match whose(name, content) {
            Whose::Ours => return None,
            Whose::Nobodys => continue,
            Whose::Left(network) => format!("is what {network} has left"),
            Whose::Foreign(what) => what,
        };
        return Some(if name.as_str() < CONFLIST {
            Bypass::Before { name: name.clone(), what }
        } else {
            Bypass::Missing
        });
    }
    Some(Bypass::Missing)
}

#[cfg(test)]
mod tests {
    use super::*;

    const OURS: &str =
        r#"{"cniVersion":"1.1.0","name":"k8s-pod-network","plugins":[{"type":"margay"},{"type":"portmap"}]}"#;

    #[test]
    fn a_configuration_is_known_by_its_plugins_and_its_name() {
        let calico = r#"{"name":"k8s-pod-network","plugins":[{"type":"calico","ipam":{"type":"calico-ipam"}},{"type":"portmap"}]}"#;
        let multus = r#"{"type":"multus-shim","clusterNetwork":"/host/etc/cni/net.d/10-margay.conflist"}"#;
        let delegates = r#"{"type":"meta","delegates":[{"name":"x","plugins":[{"type":"margay"}]}]}"#;
        let chained = r#"{"plugins":[{"type":"margay"},{"type":"cilium-cni"}]}"#;
        let table = [
            ("10-margay.conflist", OURS, Whose::Ours),
            ("00-multus.conf", multus, Whose::Ours),
            ("00-meta.conf", delegates, Whose::Ours),
            ("05-cilium.conflist", chained, Whose::Ours),
            ("10-calico.conflist", calico, Whose::Left("Calico")),
            ("10-canal.conflist", calico, Whose::Left("Canal")),
            ("01-net.conflist", calico, Whose::Left("Calico")),
            ("10-kindnet.conflist", r#"{"plugins":[{"type":"ptp"}]}"#, Whose::Left("kindnet")),
            ("10-calico.conflist", "{", Whose::Left("Calico")),
            ("05-x.conf", "\n", Whose::Nobodys),
            (
                "05-x.conf",
                r#"{"type":"bridge","ipam":{"type":"host-local"}}"#,
                Whose::Foreign("calls bridge, host-local".to_owned()),
            ),
            ("05-x.conf", "{}", Whose::Foreign("names no plugin".to_owned())),
        ];
        for (name, content, wanted) in table {
            assert_eq!(whose(name, content), wanted, "{name}: {content}");
        }
        assert!(matches!(whose("05-x.conf", "{"), Whose::Foreign(what) if what.starts_with("is not JSON")));
    }

    #[test]
    fn what_stands_before_ours_is_named() {
        let bridge = r#"{"type":"bridge"}"#;
        let folder = |files: &[(&str, &str)]| {
            let files = files.iter().map(|(name, content)| ((*name).to_owned(), (*content).to_owned())).collect();
            bypass(&files).map(|bypass| match bypass {
                Bypass::Missing => "missing".to_owned(),
                Bypass::Before { name, .. } => name,
            })
        };
        assert_eq!(folder(&[(CONFLIST, OURS)]), None);
        assert_eq!(folder(&[("09-x.conf", bridge), (CONFLIST, OURS)]), Some("09-x.conf".to_owned()));
        assert_eq!(folder(&[("09-x.conf", ""), (CONFLIST, OURS)]), None, "passed over");
        assert_eq!(folder(&[("09-x.conf.margay-saved", bridge), (CONFLIST, OURS)]), None, "not read");
        assert_eq!(folder(&[("11-x.conf", bridge), (CONFLIST, OURS)]), None);
        assert_eq!(folder(&[("11-x.conf", bridge)]), Some("missing".to_owned()));
        assert_eq!(folder(&[]), Some("missing".to_owned()));
        let text = Bypass::Before { name: "09-x.conf".to_owned(), what: "calls bridge".to_owned() }.to_string();
        assert!(
            text.contains("takes 09-x.conf") && text.contains("it calls bridge") && text.contains("remove the file"),
            "{text}"
        );
    }
}
