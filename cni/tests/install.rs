//! `margay-cni install` as the init container runs it.

use std::fs;
use std::os::unix::fs::{MetadataExt, PermissionsExt, symlink};
use std::path::PathBuf;
use std::process::Command;

use tempfile::TempDir;

const CONFLIST: &str =
    r#"{"cniVersion":"1.1.0","name":"k8s-pod-network","plugins":[{"type":"margay"}]}"#;

struct Host {
    root: TempDir,
}

impl Host {
    fn new() -> Self {
        let root = TempDir::new().expect("folder");
        for name in ["bin", "net.d"] {
            fs::create_dir(root.path().join(name)).expect("create");
        }
        Self { root }
    }

    fn path(&self, name: &str) -> PathBuf {
        self.root.path().join(name)
    }

    fn install(&self, conflist: &str) -> Result<String, String> {
        let output = Command::new(env!("CARGO_BIN_EXE_margay-cni"))
            .arg("install")
            .env_clear()
            .env("CNI_BIN_DIR", self.path("bin"))
            .env("CNI_CONF_DIR", self.path("net.d"))
            .env("CNI_CONFLIST", conflist)
            .output()
            .expect("start");
        let text = String::from_utf8(output.stderr).expect("text");
        if output.status.success() {
            Ok(text)
        } else {
            Err(text)
        }
    }

    /// Lists both folders, with the attributes that change when a file is written again.
    fn listing(&self) -> Vec<(PathBuf, u64, u32, i64, i64)> {
        let mut found: Vec<_> = ["bin", "net.d"]
            .iter()
            .flat_map(|folder| fs::read_dir(self.path(folder)).expect("list"))
            .map(|entry| {
                let path = entry.expect("entry").path();
                let meta = fs::symlink_metadata(&path).expect("stat");
                (
                    path,
                    meta.ino(),
                    meta.mode() & 0o7777,
                    meta.ctime(),
                    meta.ctime_nsec(),
                )
            })
            .collect();
        found.sort();
        found
    }
}

#[test]
fn both_files_are_written_with_their_modes() {
    let host = Host::new();
    let report = host.install(CONFLIST).expect("installs");
    assert!(!report.contains("warning"), "{report}");
    let modes: Vec<_> = host
        .listing()
        .into_iter()
        .map(|(path, _, mode, ..)| (path, mode))
        .collect();
    assert_eq!(
        modes,
        [
            (host.path("bin/margay"), 0o755),
            (host.path("net.d/10-margay.conflist"), 0o600)
        ]
    );
    let own = fs::read(env!("CARGO_BIN_EXE_margay-cni")).expect("read");
    assert!(fs::read(host.path("bin/margay")).expect("read") == own);
    assert_eq!(
        fs::read_to_string(host.path("net.d/10-margay.conflist")).expect("read"),
        CONFLIST
    );
    let output = Command::new(host.path("bin/margay"))
        .env("CNI_COMMAND", "VERSION")
        .output();
    assert!(output.expect("start").status.success());
}

#[test]
fn the_second_time_changes_nothing() {
    let host = Host::new();
    host.install(CONFLIST).expect("installs");
    let before = host.listing();
    let report = host.install(CONFLIST).expect("installs");
    assert_eq!(host.listing(), before);
    assert_eq!(report.matches("is up to date").count(), 2, "{report}");
}

#[test]
fn what_differs_is_replaced() {
    let host = Host::new();
    host.install(CONFLIST).expect("installs");
    let conflist = host.path("net.d/10-margay.conflist");
    let former = fs::metadata(&conflist).expect("stat").ino();
    fs::set_permissions(&conflist, fs::Permissions::from_mode(0o644)).expect("chmod");
    host.install(CONFLIST).expect("installs");
    let meta = fs::metadata(&conflist).expect("stat");
    assert_eq!(meta.mode() & 0o7777, 0o600);
    assert_ne!(meta.ino(), former, "replaced, not written in place");

    fs::write(host.path("bin/margay"), "half of an old plugin").expect("write");
    // Leftovers of an interrupted run do no harm.
    fs::write(host.path("bin/.margay.new"), "x").expect("write");
    let other = host.path("bin/elsewhere");
    fs::write(&other, CONFLIST).expect("write");
    fs::remove_file(&conflist).expect("remove");
    symlink(&other, &conflist).expect("link");
    let changed = CONFLIST.replace("1.1.0", "1.0.0");
    host.install(&changed).expect("installs");
    assert!(fs::symlink_metadata(&conflist).expect("stat").is_file());
    assert_eq!(fs::read_to_string(&conflist).expect("read"), changed);
    assert_eq!(fs::read_to_string(&other).expect("read"), CONFLIST);
    assert!(!host.path("bin/.margay.new").exists());
    let output = Command::new(host.path("bin/margay"))
        .env("CNI_COMMAND", "VERSION")
        .output();
    assert!(output.expect("start").status.success());
}

#[test]
fn configurations_of_former_networks_are_set_aside() {
    let host = Host::new();
    let calico = r#"{"name":"k8s-pod-network","plugins":[{"type":"calico"},{"type":"portmap"}]}"#;
    let left = [
        ("10-calico.conflist", calico),
        ("10-canal.conflist", calico),
        ("10-flannel.conflist", r#"{"plugins":[{"type":"flannel"}]}"#),
        ("10-kindnet.conflist", "{"),
    ];
    for (name, text) in left {
        fs::write(host.path("net.d").join(name), text).expect("write");
    }
    let report = host.install(CONFLIST).expect("installs");
    assert!(!report.contains("warning"), "{report}");
    for (name, text) in left {
        assert!(!host.path("net.d").join(name).exists(), "{name}");
        let aside = fs::read_to_string(host.path("net.d").join(format!("{name}.margay-saved")))
            .expect("aside");
        assert_eq!(aside, text);
    }
    assert!(
        report.contains("10-calico.conflist of Calico set aside"),
        "{report}"
    );
    assert!(
        !host
            .install(CONFLIST)
            .expect("installs")
            .contains("set aside"),
        "once"
    );
}

#[test]
fn configurations_that_call_our_plugin_and_unknown_ones_stay_with_a_warning_about_the_latter() {
    let host = Host::new();
    let files = [
        ("00-multus.conf", r#"{"type":"multus-shim"}"#),
        ("00-readme.txt", "{}"),
        ("05-empty.conf", ""),
        ("05-first.conf", r#"{"type":"bridge"}"#),
        ("06-bad.conflist", "{"),
        ("20-calico.conflist", r#"{"plugins":[{"type":"calico"}]}"#),
    ];
    for (name, text) in files {
        fs::write(host.path("net.d").join(name), text).expect("write");
    }
    let report = host.install(CONFLIST).expect("installs");
    let warned: Vec<_> = report
        .lines()
        .filter(|line| line.contains("warning"))
        .collect();
    assert_eq!(warned.len(), 2, "{report}");
    assert!(
        warned[0].contains("05-first.conf") && warned[0].contains("calls bridge"),
        "{report}"
    );
    assert!(
        warned[1].contains("06-bad.conflist") && warned[1].contains("is not JSON"),
        "{report}"
    );
    for (name, text) in files {
        assert_eq!(
            fs::read_to_string(host.path("net.d").join(name)).expect("stays"),
            text
        );
    }

    let chained = CONFLIST.replace(
        r#"[{"type":"margay"}]"#,
        r#"[{"type":"margay"},{"type":"portmap"}]"#,
    );
    let report = host.install(&chained).expect("installs");
    assert!(report.contains(r#"calls the plugin "portmap""#), "{report}");
}

#[test]
fn a_bad_configuration_installs_nothing() {
    let table = [
        ("", "CNI_CONFLIST is not set"),
        ("{", "EOF"),
        ("{}", "cniVersion"),
        (
            r#"{"cniVersion":"0.2.0"}"#,
            r#"cniVersion="0.2.0": must be one of 0.3.1"#,
        ),
        (r#"{"cniVersion":"1.1.0"}"#, "name"),
        (
            r#"{"cniVersion":"1.1.0","name":"n","plugins":[{}]}"#,
            "must have a type",
        ),
        (
            r#"{"cniVersion":"1.1.0","name":"n","plugins":[]}"#,
            r#"must be of type "margay""#,
        ),
    ];
    let host = Host::new();
    for (conflist, wanted) in table {
        let error = host.install(conflist).expect_err("refused");
        assert!(error.contains(wanted), "{conflist:?}: {error}");
        assert_eq!(host.listing(), []);
    }
}

#[test]
fn a_folder_that_is_not_the_hosts_is_refused() {
    let host = Host::new();
    fs::remove_dir(host.path("net.d")).expect("remove");
    let error = host.install(CONFLIST).expect_err("no folder");
    assert!(
        error.contains("net.d") && error.contains("hostPath"),
        "{error}"
    );
    assert!(!host.path("bin/margay").exists());

    fs::create_dir_all(host.path("net.d/10-margay.conflist/x")).expect("create");
    let error = host.install(CONFLIST).expect_err("a folder in the way");
    assert!(
        error.contains("10-margay.conflist") && error.contains("writable"),
        "{error}"
    );
    assert!(!host.path("net.d/.10-margay.conflist.new").exists());
}
