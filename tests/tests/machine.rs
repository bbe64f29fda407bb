//! Preconditions of other suites in a machine with another kernel, and the probe's report where a
//! kernel lacks modules: they are kept from being loaded, so it runs before all others. It changes
//! the machine that it runs on: `make kernels` runs it, `cargo test` does not.

use std::fs;
use std::path::Path;

use anyhow::{Result, ensure};
use margay_dataplane::probe::{self, MissingFeature};
use margay_tests::machine::boot::PARAMETER;
use margay_tests::probe::sctp::has_sockets;

/// Configuration of modprobe with the modules not to load.
const WITHHELD: &str = "/etc/modprobe.d/margay-withheld.conf";
/// Modules without which nothing can be enforced, in the order of the trials.
const ALWAYS: [&str; 5] = ["nf_tables", "nft_ct", "nft_masq", "nft_fib_inet", "veth"];
/// The others.
const OPTIONAL: [&str; 4] = ["nf_conntrack_netlink", "nft_log", "nft_limit", "vxlan"];

/// Modules that the probe reports as missing without these. A module that has been loaded cannot be
/// withheld any more.
fn without(withheld: &[&str]) -> Result<Vec<MissingFeature>> {
    for module in withheld {
        ensure!(
            !Path::new("/sys/module").join(module).exists(),
            "{module} is there already"
        );
    }
    let lines: String = withheld
        .iter()
        .map(|module| format!("install {module} /bin/false\n"))
        .collect();
    fs::write(WITHHELD, lines)?;
    let missing = probe::probe();
    fs::remove_file(WITHHELD)?;
    Ok(missing?)
}

fn modules(missing: &[MissingFeature]) -> Vec<&'static str> {
    let mut modules: Vec<_> = missing.iter().map(MissingFeature::module).collect();
    modules.dedup();
    modules
}

#[test]
fn missing_kernel_features_are_found_and_reported() -> Result<()> {
    ensure!(
        fs::read_to_string("/proc/cmdline")?.contains(PARAMETER),
        "this is no machine of `make kernels`"
    );
    let all = [&ALWAYS[..], &OPTIONAL].concat();
    // Features that need the first one are missing with it.
    let mut found = modules(&without(&all)?);
    found.sort_unstable();
    found.dedup();
    let mut wanted = all.clone();
    wanted.sort_unstable();
    ensure!(found == wanted, "without {all:?}: {found:?}");

    let missing = without(&all[1..])?;
    let found = modules(&missing);
    ensure!(found == all[1..], "without {:?}: {found:?}", &all[1..]);
    let refused = probe::require_features(missing)
        .err()
        .map(|unfit| unfit.to_string())
        .unwrap_or_default();
    for module in ALWAYS {
        ensure!(
            refused.contains(&format!("load the module {module} ")) == (module != ALWAYS[0]),
            "{module}: {refused}"
        );
    }

    let missing = probe::require_features(without(&OPTIONAL)?)?;
    ensure!(
        modules(&missing) == OPTIONAL,
        "without {OPTIONAL:?}: {:?}",
        modules(&missing)
    );

    let missing = without(&[])?;
    ensure!(
        missing.is_empty(),
        "{:?}",
        probe::describe_missing(&missing)
    );
    Ok(())
}

/// Elsewhere policy on SCTP is tested with raw packets; see `margay_tests::probe::sctp`.
#[test]
fn sctp_is_asked_by_sockets() -> Result<()> {
    ensure!(has_sockets(), "the kernel has no sockets of SCTP");
    Ok(())
}
