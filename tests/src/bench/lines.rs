//! Every figure with its anchor and its budget.
//!
//! Anchors of the cluster are Calico's, measured with probes of the same kind on a cluster of the
//! same shape (2 cores, three nodes), but on another day: sizes compare, percents do not.

use super::figure::Line;

const CALICO: &str = "Calico";
const FELIX: &str = "Felix's driver";
const NFT: &str = "the nft program";

/// ptp with host-local IPAM: no policy, and nobody else is notified.
const PTP: &str = "ptp + host-local";

const fn line(
    key: &'static str,
    what: &'static str,
    unit: &'static str,
    anchor: Option<(f64, &'static str)>,
    budget: Option<f64>,
) -> Line {
    Line {
        key,
        what,
        unit,
        anchor,
        budget,
    }
}

const fn calico(value: f64) -> Option<(f64, &'static str)> {
    Some((value, CALICO))
}

const fn most(value: f64) -> Option<f64> {
    Some(value)
}

/// All of them.
pub const LINES: &[Line] = &[
    line(
        "install.ready",
        "manifests applied to every node Ready and enforcing",
        "s",
        calico(3.5),
        most(10.0),
    ),
    line(
        "local.add.p50",
        "CNI ADD without Kubernetes, policy in force, p50",
        "ms",
        Some((9.8, PTP)),
        most(4.9),
    ),
    line(
        "local.del.p50",
        "CNI DEL without Kubernetes, p50",
        "ms",
        None,
        None,
    ),
    line(
        "local.add.burst",
        "CNI ADD without Kubernetes, 16 at once, time per pod",
        "ms",
        Some((13.5, PTP)),
        most(4.5),
    ),
    line(
        "local.del.burst",
        "CNI DEL without Kubernetes, 16 at once, time per pod",
        "ms",
        None,
        None,
    ),
    line(
        "local.add.cpu.3",
        "CPU per ADD without Kubernetes, 3 nodes in the view",
        "ms",
        None,
        None,
    ),
    line(
        "local.add.cpu.5000",
        "CPU per ADD without Kubernetes, 5,000 nodes in the view",
        "ms",
        None,
        None,
    ),
    line(
        "local.add.cpu.ratio",
        "  over that with 3 nodes",
        "x",
        None,
        most(1.1),
    ),
    line(
        "memory.agent.idle",
        "agent RSS, idle, largest of three",
        "MiB",
        calico(130.0),
        most(20.0),
    ),
    line(
        "memory.agent.full",
        "agent RSS, 100 pods and 1000 policies",
        "MiB",
        calico(139.0),
        most(30.0),
    ),
    line(
        "memory.agent.10k",
        "agent RSS, 100 pods and 10,000 policies",
        "MiB",
        None,
        None,
    ),
    line(
        "memory.typha.idle",
        "typha RSS, idle, largest replica",
        "MiB",
        calico(129.0),
        most(25.0),
    ),
    line(
        "memory.typha.full",
        "typha RSS, 1000 policies",
        "MiB",
        calico(136.0),
        None,
    ),
    line(
        "memory.typha.10k",
        "typha RSS, 10,000 policies",
        "MiB",
        None,
        None,
    ),
    line("memory.operator", "operator RSS", "MiB", None, None),
    line(
        "memory.plugin",
        "plugin, largest RSS of a call (p50)",
        "MiB",
        calico(86.0),
        most(3.0),
    ),
    line(
        "cni.add.p50",
        "CNI ADD, pods one by one, p50",
        "ms",
        calico(412.0),
        most(20.0),
    ),
    line(
        "cni.add.p99",
        "CNI ADD, pods one by one, p99",
        "ms",
        calico(745.0),
        None,
    ),
    line(
        "cni.add.cpu",
        "CPU of plugin and agent per ADD",
        "ms",
        calico(252.0),
        most(10.0),
    ),
    line(
        "cni.add.requests",
        "API requests per pod by the agent",
        "",
        calico(20.0),
        most(3.0),
    ),
    line(
        "pods.serial.ready",
        "pod created to Ready, one by one, p50",
        "ms",
        calico(798.0),
        None,
    ),
    line(
        "pods.burst.ready",
        "60 pods at once on one node, all Ready",
        "s",
        calico(35.6),
        most(14.2),
    ),
    line(
        "pods.burst.add",
        "CNI ADD among 60 at once, p50",
        "ms",
        calico(20_700.0),
        None,
    ),
    line(
        "pods.delete.p50",
        "CNI DEL while a namespace of 60 is deleted, p50",
        "s",
        calico(14.4),
        most(0.2),
    ),
    line(
        "policy.same.0.p50",
        "policy: API answer to packets, same node, no others, p50",
        "ms",
        calico(20.0),
        most(3.0),
    ),
    line(
        "policy.same.0.p99",
        "  p99",
        "ms",
        calico(102.0),
        most(20.0),
    ),
    line(
        "policy.cross.0.p50",
        "policy: across nodes, no others, p50",
        "ms",
        calico(19.0),
        most(3.0),
    ),
    line(
        "policy.cross.0.p99",
        "  p99",
        "ms",
        calico(113.0),
        most(20.0),
    ),
    line(
        "policy.same.1000.p50",
        "policy: same node, 1000 others, p50",
        "ms",
        calico(36.0),
        most(3.0),
    ),
    line(
        "policy.same.1000.p99",
        "  p99",
        "ms",
        calico(247.0),
        most(20.0),
    ),
    line(
        "policy.cross.1000.p50",
        "policy: across nodes, 1000 others, p50",
        "ms",
        calico(24.0),
        most(3.0),
    ),
    line(
        "policy.cross.1000.p99",
        "  p99",
        "ms",
        calico(90.0),
        most(20.0),
    ),
    line(
        "policy.same.10000.p50",
        "policy: same node, 10,000 others, p50",
        "ms",
        None,
        most(3.0),
    ),
    line("policy.same.10000.p99", "  p99", "ms", None, most(20.0)),
    line(
        "policy.cross.10000.p50",
        "policy: across nodes, 10,000 others, p50",
        "ms",
        None,
        most(3.0),
    ),
    line("policy.cross.10000.p99", "  p99", "ms", None, most(20.0)),
    line(
        "policy.cpu.0",
        "CPU of all agents per policy change, no others",
        "ms",
        calico(42.0),
        most(3.0),
    ),
    line(
        "policy.cpu.1000",
        "CPU of all agents per policy change, 1000 others",
        "ms",
        calico(42.0),
        most(3.0),
    ),
    line(
        "policy.cpu.10000",
        "CPU of all agents per policy change, 10,000 others",
        "ms",
        None,
        most(3.0),
    ),
    line(
        "connect.control",
        "connect without policies: other server over one (must be 1)",
        "x",
        calico(0.99),
        None,
    ),
    line(
        "connect.same",
        "connect under 200 policies x 5 rules over none, same node, p50",
        "x",
        calico(2.81),
        most(1.1),
    ),
    line(
        "connect.cross",
        "connect under 200 policies x 5 rules over none, across, p50",
        "x",
        calico(2.00),
        most(1.1),
    ),
    line(
        "connect.ports",
        "the same with a port of its own in every rule, same node, p50",
        "x",
        None,
        most(1.1),
    ),
    line(
        "connect.10k",
        "connect, few of 10,000 policies over few of 10, p50",
        "x",
        None,
        most(1.1),
    ),
    line(
        "restart.denied",
        "denied connects that passed while the agent was killed",
        "",
        calico(0.0),
        most(0.0),
    ),
    line(
        "restart.allowed",
        "allowed connects that failed meanwhile",
        "",
        calico(0.0),
        most(0.0),
    ),
    line(
        "restart.held",
        "held connections that broke meanwhile",
        "",
        calico(0.0),
        most(0.0),
    ),
    line(
        "driver.member.1k",
        "one member of a set of 1000 in the driver, p50",
        "us",
        Some((9_000.0, FELIX)),
        most(1000.0),
    ),
    line(
        "driver.member.10k",
        "one member of a set of 10,000 in the driver, p50",
        "us",
        Some((9_000.0, FELIX)),
        most(1000.0),
    ),
    line(
        "driver.member.100k",
        "one member of a set of 100,000 in the driver, p50",
        "us",
        Some((22_000.0, FELIX)),
        most(1000.0),
    ),
    line(
        "driver.load.100k",
        "a set of 100,000 built, encoded and committed",
        "ms",
        None,
        None,
    ),
    line(
        "driver.range.1k",
        "one range of an interval set of 1000 in the driver, p50",
        "us",
        Some((19_900.0, NFT)),
        None,
    ),
    line(
        "driver.range.10k",
        "one range of an interval set of 10,000 in the driver, p50",
        "us",
        Some((103_000.0, NFT)),
        None,
    ),
];
