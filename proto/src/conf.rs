//! Network configurations in a node's CNI folder: which one the container runtime uses, and which
//! network owns it. Shared by installer and agent, which must agree on it.

use std::collections::BTreeMap;
use std::fmt;

use serde_json::Value;

/// Name of the plugin in the binary folder, which is its `type` in a configuration.
pub const PLUGIN: &str = "margay";
/// Name of our configuration. Runtimes use the first one by name.
pub const CONFLIST: &str = "10-margay.conflist";
/// Suffix of a configuration that is set aside, so that no runtime reads it.
pub const SAVED: &str = ".margay-saved";
/// Suffixes of the files that runtimes read (libcni's `ConfFiles`).
const CONF_SUFFIXES: [&str; 3] = [".conf", ".conflist", ".json"];
/// Meta plugins, which call the other plugins of a cluster, possibly ours.
const META_PLUGINS: [&str; 3] = ["multus", "multus-cni", "multus-shim"];

/// Networks that leave their configuration behind: name, prefixes of their file names, and types of
/// their plugins.
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

/// Owner of a configuration.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum ConfOwner {
    /// Ours: it calls our plugin, or a meta plugin that does.
    Ours,
    /// None: it is empty, and runtimes skip it.
    Empty,
    /// Left behind by that network.
    LeftBehind(&'static str),
    /// Another network's: the plugin that it calls, or the reason why a runtime cannot use it.
    Foreign(String),
}

/// Returns true if runtimes read a file of that name.
pub fn is_read(name: &str) -> bool {
    CONF_SUFFIXES.iter().any(|suffix| name.ends_with(suffix))
}

/// Classifies the configuration in that file.
pub fn owner_of(name: &str, content: &str) -> ConfOwner {
    if content.trim().is_empty() {
        return ConfOwner::Empty;
    }
    let parsed = serde_json::from_str::<Value>(content);
    let mut types = Vec::new();
    if let Ok(configuration) = &parsed {
        collect_types(configuration, &mut types);
    }
    if types
        .iter()
        .any(|kind| *kind == PLUGIN || META_PLUGINS.contains(kind))
    {
        return ConfOwner::Ours;
    }
    let is_of = |(_, begin, plugins): &&(&str, &str, &[&str])| {
        name.starts_with(begin) || types.iter().any(|kind| plugins.contains(kind))
    };
    match (NETWORKS.iter().find(is_of), &parsed) {
        (Some((network, ..)), _) => ConfOwner::LeftBehind(network),
        (None, Err(error)) => ConfOwner::Foreign(format!("is not JSON, {error}")),
        (None, Ok(_)) if types.is_empty() => ConfOwner::Foreign("names no plugin".to_owned()),
        (None, Ok(_)) => ConfOwner::Foreign(format!("calls {}", types.join(", "))),
    }
}

/// Collects every plugin type in a configuration, at any depth: meta plugins contain configurations
/// of others.
fn collect_types<'a>(value: &'a Value, types: &mut Vec<&'a str>) {
    match value {
        Value::Object(fields) => {
            types.extend(fields.get("type").and_then(Value::as_str));
            fields
                .values()
                .for_each(|below| collect_types(below, types));
        }
        Value::Array(list) => list.iter().for_each(|below| collect_types(below, types)),
        _ => {}
    }
}

/// Reason why the runtime does not call our plugin.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Bypass {
    /// Our configuration is missing.
    Missing,
    /// Another configuration comes first.
    Before {
        /// Its file name.
        name: String,
        /// Its problem for us.
        what: String,
    },
}

impl fmt::Display for Bypass {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Missing => write!(
                f,
                "{CONFLIST} is missing from the CNI configuration folder, so new pods get no \
                 network; delete the agent's pod on this node, and its replacement writes the file"
            ),
            Self::Before { name, what } => write!(
                f,
                "the container runtime uses {name} from the CNI configuration folder instead of \
                 {CONFLIST}, and it {what}: new pods are not in Margay's network, or do not start; \
                 remove the file, or make it call the plugin {PLUGIN}"
            ),
        }
    }
}

/// Returns the reason why the runtime of a node with these files (content by name) does not call
/// our plugin; `None` if it does.
pub fn bypass(files: &BTreeMap<String, String>) -> Option<Bypass> {
    // By name, which is the order in which runtimes choose.
    for (name, content) in files.iter().filter(|(name, _)| is_read(name)) {
        let what = match owner_of(name, content) {
            ConfOwner::Ours => return None,
            ConfOwner::Empty => continue,
            ConfOwner::LeftBehind(network) => format!("was left behind by {network}"),
            ConfOwner::Foreign(what) => what,
        };
        return Some(if name.as_str() < CONFLIST {
            Bypass::Before {
                name: name.clone(),
                what,
            }
        } else {
            Bypass::Missing
        });
    }
    Some(Bypass::Missing)
}

#[cfg(test)]
mod tests {
    use super::*;

    const OURS: &str = r#"{"cniVersion":"1.1.0","name":"k8s-pod-network","plugins":[{"type":"margay"},{"type":"portmap"}]}"#;

    #[test]
    fn a_configuration_is_classified_by_its_plugins_and_its_name() {
        let calico = r#"{"name":"k8s-pod-network","plugins":[{"type":"calico","ipam":{"type":"calico-ipam"}},{"type":"portmap"}]}"#;
        let multus =
            r#"{"type":"multus-shim","clusterNetwork":"/host/etc/cni/net.d/10-margay.conflist"}"#;
        let delegates =
            r#"{"type":"meta","delegates":[{"name":"x","plugins":[{"type":"margay"}]}]}"#;
        let chained = r#"{"plugins":[{"type":"margay"},{"type":"cilium-cni"}]}"#;
        let table = [
            ("10-margay.conflist", OURS, ConfOwner::Ours),
            ("00-multus.conf", multus, ConfOwner::Ours),
            ("00-meta.conf", delegates, ConfOwner::Ours),
            ("05-cilium.conflist", chained, ConfOwner::Ours),
            (
                "10-calico.conflist",
                calico,
                ConfOwner::LeftBehind("Calico"),
            ),
            ("10-canal.conflist", calico, ConfOwner::LeftBehind("Canal")),
            ("01-net.conflist", calico, ConfOwner::LeftBehind("Calico")),
            (
                "10-kindnet.conflist",
                r#"{"plugins":[{"type":"ptp"}]}"#,
                ConfOwner::LeftBehind("kindnet"),
            ),
            ("10-calico.conflist", "{", ConfOwner::LeftBehind("Calico")),
            ("05-x.conf", "\n", ConfOwner::Empty),
            (
                "05-x.conf",
                r#"{"type":"bridge","ipam":{"type":"host-local"}}"#,
                ConfOwner::Foreign("calls bridge, host-local".to_owned()),
            ),
            (
                "05-x.conf",
                "{}",
                ConfOwner::Foreign("names no plugin".to_owned()),
            ),
        ];
        for (name, content, wanted) in table {
            assert_eq!(owner_of(name, content), wanted, "{name}: {content}");
        }
        assert!(matches!(
            owner_of("05-x.conf", "{"),
            ConfOwner::Foreign(what) if what.starts_with("is not JSON"),
        ));
    }

    #[test]
    fn a_configuration_before_ours_is_named() {
        let bridge = r#"{"type":"bridge"}"#;
        let folder = |files: &[(&str, &str)]| {
            let files = files
                .iter()
                .map(|(name, content)| ((*name).to_owned(), (*content).to_owned()))
                .collect();
            bypass(&files).map(|bypass| match bypass {
                Bypass::Missing => "missing".to_owned(),
                Bypass::Before { name, .. } => name,
            })
        };
        assert_eq!(folder(&[(CONFLIST, OURS)]), None);
        assert_eq!(
            folder(&[("09-x.conf", bridge), (CONFLIST, OURS)]),
            Some("09-x.conf".to_owned())
        );
        assert_eq!(
            folder(&[("09-x.conf", ""), (CONFLIST, OURS)]),
            None,
            "skipped"
        );
        assert_eq!(
            folder(&[("09-x.conf.margay-saved", bridge), (CONFLIST, OURS)]),
            None,
            "not read"
        );
        assert_eq!(folder(&[("11-x.conf", bridge), (CONFLIST, OURS)]), None);
        assert_eq!(folder(&[("11-x.conf", bridge)]), Some("missing".to_owned()));
        assert_eq!(folder(&[]), Some("missing".to_owned()));
        let text = Bypass::Before {
            name: "09-x.conf".to_owned(),
            what: "calls bridge".to_owned(),
        }
        .to_string();
        assert!(
            text.contains("uses 09-x.conf")
                && text.contains("it calls bridge")
                && text.contains("remove the file"),
            "{text}"
        );
    }
}
