//! Tables of objects: the columns of each kind, from calicoctl.

use anyhow::{Result, bail};
use margay_api::storage::Kind;
use serde_json::Value;

/// Space between columns.
const GAP: usize = 3;

/// What stands in a column.
#[derive(Clone, Copy, Debug)]
enum Cell {
    /// The value at a path; what is not there is shown as the text.
    At(&'static str, &'static str),
    /// The values of a list, with commas in between.
    List(&'static str),
}

/// A column: heading and cell.
type Column = (&'static str, Cell);

const NAME: Column = ("NAME", Cell::At("/metadata/name", ""));
const NAMESPACE: Column = ("NAMESPACE", Cell::At("/metadata/namespace", ""));
const ORDER: Column = ("ORDER", Cell::At("/spec/order", "<nil>"));
const TIER: Column = ("TIER", Cell::At("/spec/tier", "default"));
const SELECTOR: Column = ("SELECTOR", Cell::At("/spec/selector", ""));

/// Columns of a kind, and the headings of those that are shown unless more is asked for; none: all.
fn columns(kind: &str) -> (Vec<Column>, &'static [&'static str]) {
    let at = |heading, path, absent| (heading, Cell::At(path, absent));
    match kind {
        "BGPConfiguration" => {
            let log = at("LOGSEVERITY", "/spec/logSeverityScreen", "");
            let mesh = at("MESHENABLED", "/spec/nodeToNodeMeshEnabled", "");
            (
                vec![NAME, log, mesh, at("ASNUMBER", "/spec/asNumber", "-")],
                &[],
            )
        }
        "BGPPeer" => {
            let (ip, node) = (
                at("PEERIP", "/spec/peerIP", ""),
                at("NODE", "/spec/node", "(global)"),
            );
            (vec![NAME, ip, node, at("ASN", "/spec/asNumber", "")], &[])
        }
        "ClusterInformation" => (
            vec![
                NAME,
                at("CLUSTERGUID", "/spec/clusterGUID", ""),
                at("CLUSTERTYPE", "/spec/clusterType", ""),
                at("CALICOVERSION", "/spec/calicoVersion", ""),
                at("DATASTOREREADY", "/spec/datastoreReady", "<nil>"),
            ],
            &[],
        ),
        "FelixConfiguration" => (
            vec![NAME, at("LOGSEVERITY", "/spec/logSeverityScreen", "")],
            &[],
        ),
        "GlobalNetworkPolicy"
        | "StagedGlobalNetworkPolicy"
        | "NetworkPolicy"
        | "StagedNetworkPolicy" => (vec![NAME, TIER, ORDER, SELECTOR], &["NAME", "TIER"]),
        "GlobalNetworkSet" | "NetworkSet" => {
            (vec![NAME, ("NETS", Cell::List("/spec/nets"))], &["NAME"])
        }
        "HostEndpoint" => (
            vec![
                NAME,
                at("NODE", "/spec/node", ""),
                at("INTERFACE", "/spec/interfaceName", ""),
                ("IPS", Cell::List("/spec/expectedIPs")),
                ("PROFILES", Cell::List("/spec/profiles")),
            ],
            &["NAME", "NODE"],
        ),
        "IPPool" => (
            vec![
                NAME,
                at("CIDR", "/spec/cidr", ""),
                at("NAT", "/spec/natOutgoing", "false"),
                at("IPIPMODE", "/spec/ipipMode", "Never"),
                at("VXLANMODE", "/spec/vxlanMode", "Never"),
                at("DISABLED", "/spec/disabled", "false"),
                at("DISABLEBGPEXPORT", "/spec/disableBGPExport", "false"),
                at("SELECTOR", "/spec/nodeSelector", "all()"),
            ],
            &["NAME", "CIDR", "SELECTOR"],
        ),
        "IPReservation" => (
            vec![NAME, ("RESERVED CIDRS", Cell::List("/spec/reservedCIDRs"))],
            &[],
        ),
        "Tier" => (
            vec![
                NAME,
                ORDER,
                at("DEFAULTACTION", "/spec/defaultAction", "Deny"),
            ],
            &["NAME", "ORDER"],
        ),
        _ => (vec![NAME], &[]),
    }
}

/// Which columns a table has.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Width {
    /// The usual ones.
    Usual,
    /// All.
    Wide,
    /// Those of these headings.
    Custom(Vec<String>),
}

/// Formats objects of a kind as a table, with a column for the namespace if that is asked for.
pub fn table(
    kind: &Kind,
    objects: &[Value],
    width: &Width,
    has_namespaces: bool,
) -> Result<String> {
    let (all, usual) = columns(kind.kind);
    let mut shown: Vec<Column> = match width {
        Width::Usual => {
            let is_usual = |heading: &&str| usual.is_empty() || usual.contains(heading);
            all.into_iter()
                .filter(|(heading, _)| is_usual(heading))
                .collect()
        }
        Width::Wide => all,
        Width::Custom(headings) => custom(kind, &all, headings)?,
    };
    if has_namespaces
        && kind.namespaced
        && !shown.iter().any(|(heading, _)| *heading == "NAMESPACE")
    {
        shown.insert(0, NAMESPACE);
    }
    let header = shown
        .iter()
        .map(|(heading, _)| (*heading).to_owned())
        .collect();
    let rows = objects
        .iter()
        .map(|object| shown.iter().map(|(_, cell)| text(*cell, object)).collect());
    Ok(aligned(
        &[header]
            .into_iter()
            .chain(rows)
            .collect::<Vec<Vec<String>>>(),
    ))
}

fn custom(kind: &Kind, all: &[Column], headings: &[String]) -> Result<Vec<Column>> {
    let find = |heading: &String| {
        let wanted = heading.to_uppercase();
        let found = all
            .iter()
            .chain([&NAMESPACE])
            .find(|(known, _)| *known == wanted);
        let Some(found) = found else {
            let known: Vec<&str> = all.iter().map(|(heading, _)| *heading).collect();
            bail!(
                "custom-columns: {heading:?}: {} has no such column; it has {}",
                kind.kind,
                known.join(", ")
            );
        };
        Ok(*found)
    };
    headings.iter().map(find).collect()
}

fn text(cell: Cell, object: &Value) -> String {
    let plain = |value: &Value| {
        value
            .as_str()
            .map_or_else(|| value.to_string(), str::to_owned)
    };
    match cell {
        Cell::At(path, absent) => match object.pointer(path) {
            None | Some(Value::Null) => absent.to_owned(),
            Some(Value::String(text)) if text.is_empty() => absent.to_owned(),
            Some(value) => plain(value),
        },
        Cell::List(path) => {
            let values = object.pointer(path).and_then(Value::as_array);
            values
                .into_iter()
                .flatten()
                .map(plain)
                .collect::<Vec<_>>()
                .join(",")
        }
    }
}

/// Rows whose columns begin at the same places.
pub fn aligned(rows: &[Vec<String>]) -> String {
    let columns = rows.iter().map(Vec::len).max().unwrap_or_default();
    let width = |column: usize| {
        let cells = rows.iter().filter_map(|row| row.get(column));
        cells
            .map(|cell| cell.chars().count())
            .max()
            .unwrap_or_default()
            + GAP
    };
    let widths: Vec<usize> = (0..columns).map(width).collect();
    let mut text = String::new();
    for row in rows {
        let line: String = row
            .iter()
            .zip(&widths)
            .map(|(cell, width)| format!("{cell:width$}"))
            .collect();
        text.push_str(line.trim_end());
        text.push('\n');
    }
    text
}

/// A table in a frame. Cells of the columns from `numbers` on are aligned to the right.
pub fn framed(header: &[&str], rows: &[Vec<String>], numbers: usize) -> String {
    let width = |column: usize| {
        let cells = rows
            .iter()
            .filter_map(|row| row.get(column))
            .map(|cell| cell.chars().count());
        cells
            .chain([header[column].len()])
            .max()
            .unwrap_or_default()
    };
    let widths: Vec<usize> = (0..header.len()).map(width).collect();
    let rule: String = widths
        .iter()
        .map(|width| format!("+{}", "-".repeat(width + 2)))
        .collect();
    let mut text = format!("{rule}+\n");
    for (heading, width) in header.iter().zip(&widths) {
        text += &format!("| {heading:width$} ");
    }
    text += &format!("|\n{rule}+\n");
    for row in rows {
        for (column, (cell, width)) in row.iter().zip(&widths).enumerate() {
            text += &match column >= numbers {
                true => format!("| {cell:>width$} "),
                false => format!("| {cell:width$} "),
            };
        }
        text += "|\n";
    }
    text + &rule + "+\n"
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn kind(name: &str) -> &'static Kind {
        Kind::of(name).expect("one of Calico's kinds")
    }

    #[test]
    fn tables_have_the_columns_of_the_kind() {
        let pools = [
            json!({
                "metadata": {"name": "default-ipv4-ippool"},
                "spec": {"cidr": "10.244.0.0/16", "natOutgoing": true, "vxlanMode": "Always"},
            }),
            json!({
                "metadata": {"name": "b"}, "spec": {"cidr": "fd00::/48", "nodeSelector": "!all()"},
            }),
        ];
        let usual = table(kind("IPPool"), &pools, &Width::Usual, true).expect("a table");
        assert_eq!(
            usual,
            "NAME                  CIDR            SELECTOR\n\
             default-ipv4-ippool   10.244.0.0/16   all()\n\
             b                     fd00::/48       !all()\n"
        );
        let columns = Width::Custom(vec!["vxlanmode".to_owned(), "NAME".to_owned()]);
        let chosen = table(kind("IPPool"), &pools, &columns, false).expect("a table");
        assert_eq!(
            chosen,
            "VXLANMODE   NAME\nAlways      default-ipv4-ippool\nNever       b\n"
        );
        let wrong = table(
            kind("IPPool"),
            &pools,
            &Width::Custom(vec!["x".to_owned()]),
            false,
        );
        assert!(
            wrong
                .expect_err("no such column")
                .to_string()
                .contains("it has NAME, CIDR")
        );
    }

    #[test]
    fn namespaces_have_a_column_where_there_are_several() {
        let policy = json!({
            "metadata": {"name": "p", "namespace": "n"}, "spec": {"order": 10, "selector": "all()"},
        });
        let wide = table(kind("NetworkPolicy"), &[policy], &Width::Wide, true).expect("a table");
        assert_eq!(
            wide,
            "NAMESPACE   NAME   TIER      ORDER   SELECTOR\n\
             n           p      default   10      all()\n"
        );
    }

    #[test]
    fn frames_are_drawn() {
        let text = framed(&["A", "N"], &[vec!["long".to_owned(), "1".to_owned()]], 1);
        assert_eq!(
            text,
            "+------+---+\n| A    | N |\n+------+---+\n| long | 1 |\n+------+---+\n"
        );
    }
}
