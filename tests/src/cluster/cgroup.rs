//! A control group of its own for every node, in whichever version the machine has.
//!
//! A node sees only its group, as the root of its hierarchy, so its containers are accounted below
//! it and the whole tree can be removed when the node is gone.

use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use nix::mount::{MsFlags, mount};
use nix::sched::CloneFlags;
use serde::{Deserialize, Serialize};

use super::process::wait_for;

/// The group of one node.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Group {
    /// One per hierarchy of version 1, exactly one for version 2.
    pub hierarchies: Vec<Hierarchy>,
    /// True if the machine has version 2 alone.
    pub unified: bool,
}

/// One mounted hierarchy.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Hierarchy {
    /// Mount options that name it: `cpu,cpuacct`, `name=systemd`; empty for version 2.
    pub options: String,
    /// Name of the folder below /sys/fs/cgroup.
    pub name: String,
    /// The group's folder, on the machine.
    pub folder: PathBuf,
}

impl Group {
    /// Decides where the group `name` goes. Under version 1 it goes below the group of this
    /// process, under version 2 below the root, because a group that holds processes may not hand
    /// out controllers.
    pub fn plan(name: &str) -> Result<Self> {
        let mounts = std::fs::read_to_string("/proc/self/mountinfo")?;
        let own = std::fs::read_to_string("/proc/self/cgroup")?;
        plan(name, &mounts, &own)
    }

    /// Makes the group; one that exists already is kept.
    pub fn create(&self) -> Result<()> {
        for hierarchy in &self.hierarchies {
            let folder = &hierarchy.folder;
            std::fs::create_dir_all(folder)
                .with_context(|| format!("cannot make {}", folder.display()))?;
            let parent = folder.parent().context("a control group below no other")?;
            if self.unified {
                hand_out(parent);
            }
            // A new cpuset has no processor and no memory, and takes no process before it has.
            for file in ["cpuset.cpus", "cpuset.mems"].map(Path::new) {
                if !self.unified && folder.join(file).exists() {
                    std::fs::write(folder.join(file), std::fs::read(parent.join(file))?)?;
                }
            }
        }
        Ok(())
    }

    /// Moves the calling process into the group and makes it the root of what the process sees.
    pub fn enter(&self) -> Result<()> {
        for hierarchy in &self.hierarchies {
            join(&hierarchy.folder)?;
        }
        nix::sched::unshare(CloneFlags::CLONE_NEWCGROUP).context("cannot make a cgroup namespace")
    }

    /// Mounts what the process sees after [`enter`](Self::enter) at `target`, /sys/fs/cgroup of the
    /// node.
    pub fn mount(&self, target: &Path) -> Result<()> {
        let flags = MsFlags::MS_NOSUID | MsFlags::MS_NODEV | MsFlags::MS_NOEXEC;
        if self.unified {
            mount(
                Some("cgroup2"),
                target,
                Some("cgroup2"),
                flags,
                None::<&str>,
            )
            .context("cannot mount cgroup2")?;
            // Processes may only be in leaves: those of the node itself get one, its containers get
            // others.
            std::fs::create_dir_all(target.join("init"))?;
            join(&target.join("init"))?;
            hand_out(target);
            return Ok(());
        }
        mount(
            Some("tmpfs"),
            target,
            Some("tmpfs"),
            flags,
            Some("mode=755"),
        )
        .context("cannot mount a tmpfs")?;
        for Hierarchy { name, options, .. } in &self.hierarchies {
            let folder = target.join(name);
            std::fs::create_dir(&folder)?;
            let data = if options.starts_with("name=") {
                format!("none,{options}")
            } else {
                options.clone()
            };
            mount(
                Some("cgroup"),
                &folder,
                Some("cgroup"),
                flags,
                Some(data.as_str()),
            )
            .with_context(|| format!("cannot mount the control group {options}"))?;
        }
        Ok(())
    }

    /// Removes the group and all below it, once its last process has gone.
    pub fn remove(&self) -> Result<()> {
        for Hierarchy { folder, .. } in &self.hierarchies {
            let what = || format!("the control group {} to be empty", folder.display());
            wait_for(Duration::from_secs(10), what, || remove_tree(folder))?;
        }
        Ok(())
    }
}

/// Removes a group after those below it; true when nothing is left.
fn remove_tree(folder: &Path) -> bool {
    for entry in std::fs::read_dir(folder).into_iter().flatten().flatten() {
        if entry.file_type().is_ok_and(|kind| kind.is_dir()) {
            remove_tree(&entry.path());
        }
    }
    let _ = std::fs::remove_dir(folder);
    !folder.exists()
}

fn join(folder: &Path) -> Result<()> {
    // "0" is the writer itself, whatever its pid is called in its namespace.
    std::fs::write(folder.join("cgroup.procs"), "0")
        .with_context(|| format!("cannot enter {}", folder.display()))
}

/// Gives every controller that a group has to the groups below it. One that may not be given is not
/// needed.
fn hand_out(folder: &Path) {
    let controllers =
        std::fs::read_to_string(folder.join("cgroup.controllers")).unwrap_or_default();
    for controller in controllers.split_whitespace() {
        let _ = std::fs::write(
            folder.join("cgroup.subtree_control"),
            format!("+{controller}"),
        );
    }
}

fn plan(name: &str, mountinfo: &str, own: &str) -> Result<Group> {
    let mounts: Vec<Mount<'_>> = mountinfo.lines().filter_map(Mount::parse).collect();
    let hierarchies: Vec<Hierarchy> = mounts
        .iter()
        .filter(|mount| mount.kind == "cgroup")
        .filter_map(|mount| {
            let (options, path) = own.lines().find_map(|line| {
                let (_, rest) = line.split_once(':')?;
                let (controllers, path) = rest.split_once(':')?;
                let same = |option: &&str| controllers.split(',').next() == Some(*option);
                mount
                    .options
                    .split(',')
                    .any(|option| same(&option))
                    .then_some((controllers, path))
            })?;
            // Inside a container the mount shows only part of the hierarchy, the path is that of
            // the whole.
            let inside = path
                .strip_prefix(mount.root)
                .unwrap_or(path)
                .trim_start_matches('/');
            let folder = Path::new(mount.target).join(inside).join(name);
            let file = Path::new(mount.target)
                .file_name()?
                .to_string_lossy()
                .into_owned();
            Some(Hierarchy {
                options: options.to_owned(),
                name: file,
                folder,
            })
        })
        .collect();
    if !hierarchies.is_empty() {
        return Ok(Group {
            hierarchies,
            unified: false,
        });
    }
    let unified = mounts.iter().find(|mount| mount.kind == "cgroup2");
    ensure!(
        unified.is_some(),
        "no control groups are mounted at /sys/fs/cgroup; mount cgroup2 there"
    );
    let folders = unified
        .into_iter()
        .map(|mount| Path::new(mount.target).join(name));
    let hierarchies = folders.map(|folder| Hierarchy {
        options: String::new(),
        name: String::new(),
        folder,
    });
    Ok(Group {
        hierarchies: hierarchies.collect(),
        unified: true,
    })
}

/// The fields of a line of mountinfo that matter (proc(5)).
struct Mount<'a> {
    root: &'a str,
    target: &'a str,
    kind: &'a str,
    options: &'a str,
}

impl<'a> Mount<'a> {
    fn parse(line: &'a str) -> Option<Self> {
        let (left, right) = line.split_once(" - ")?;
        let mut left = left.split(' ').skip(3);
        let mut right = right.split(' ');
        Some(Self {
            root: left.next()?,
            target: left.next()?,
            kind: right.next()?,
            options: right.nth(1)?,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn version_1_goes_below_the_own_group_of_each_hierarchy() {
        let mounts = "32 31 0:29 / /sys/fs/cgroup/cpu,cpuacct rw,relatime - cgroup cgroup \
                      rw,cpu,cpuacct\n\
                      33 31 0:32 / /sys/fs/cgroup/memory rw shared:3 - cgroup cgroup rw,memory\n\
                      34 31 0:33 /box /sys/fs/cgroup/pids rw - cgroup cgroup rw,pids\n\
                      40 31 0:37 / /sys/fs/cgroup/systemd rw - cgroup cgroup rw,name=systemd\n\
                      41 31 0:38 / /sys/fs/cgroup/unified rw - cgroup2 cgroup2 rw\n";
        let own = "9:name=systemd:/\n4:memory:/user/7\n2:pids:/box/7\n1:cpu,cpuacct:/\n0::/\n";
        let group = plan("demo-n1", mounts, own).unwrap();
        let folders: Vec<String> = group
            .hierarchies
            .iter()
            .map(|h| h.folder.display().to_string())
            .collect();
        assert_eq!(
            folders,
            [
                "/sys/fs/cgroup/cpu,cpuacct/demo-n1",
                "/sys/fs/cgroup/memory/user/7/demo-n1",
                "/sys/fs/cgroup/pids/7/demo-n1",
                "/sys/fs/cgroup/systemd/demo-n1",
            ]
        );
        assert!(!group.unified);
    }

    #[test]
    fn version_2_goes_below_the_root() {
        let mounts =
            "30 25 0:26 / /sys/fs/cgroup rw,nosuid shared:4 - cgroup2 cgroup2 rw,nsdelegate\n";
        let group = plan("demo-n1", mounts, "0::/user.slice/session-1.scope\n").unwrap();
        assert!(group.unified);
        assert_eq!(
            group.hierarchies[0].folder,
            Path::new("/sys/fs/cgroup/demo-n1")
        );
    }

    #[test]
    fn no_hierarchy_is_an_error() {
        assert!(plan("demo-n1", "22 27 0:21 / /proc rw - proc proc rw\n", "").is_err());
    }
}
