//! Tests of concurrent and repeated calls, with real links in a network namespace and a log of
//! everything else.

use nix::sched::{CloneFlags, unshare};
use tempfile::TempDir;

use super::*;
use crate::cni::attachment::AttachmentId;
use crate::cni::ports::NotEnforced;
use margay_dataplane::Attached;
use margay_ipam::request::NoAddress;

/// Log of calls to the rest of the agent, in order.
#[derive(Clone, Default)]
struct Log(Arc<Mutex<Vec<String>>>);

impl Log {
    fn note(&self, what: String) {
        self.0.lock().push(what);
    }

    fn take(&self) -> Vec<String> {
        std::mem::take(&mut *self.0.lock())
    }
}

impl Enforcer for Log {
    async fn attach(&self, _: String, pod: Attached) -> Result<(), NotEnforced> {
        self.note(format!("attach {}", pod.endpoint));
        Ok(())
    }

    async fn detach(&self, endpoint: EndpointKey, _: String) -> bool {
        self.note(format!("detach {endpoint}"));
        true
    }

    async fn link_made(&self, _: String, _: u32, _: Attached) {}

    async fn link_gone(&self, _: String, _: Option<u32>) {}

    fn not_ready_reason(&self) -> Option<String> {
        None
    }
}

impl Addresses for Log {
    async fn assign(&self, request: AddressRequest) -> Result<Vec<IpNet>, NoAddress> {
        self.note(format!("assign {}", request.handle()));
        Ok(vec!["10.0.0.1/32".parse().expect("an address")])
    }

    async fn release(&self, handle: String) -> Result<(), NoAddress> {
        self.note(format!("release {handle}"));
        Ok(())
    }
}

impl Announcer for Log {
    fn announce(&self, attachment: &Attachment) {
        self.note(format!("announce {}", attachment.endpoint()));
    }

    fn withdraw(&self, attachment: &Attachment) {
        self.note(format!("withdraw {}", attachment.endpoint()));
    }
}

type Tested = Service<Log, Log, Log>;

/// Runs the test in a network namespace of its own, with the service, its log, and the path of the
/// pod's network namespace.
fn run<F: Future<Output = ()>>(test: impl FnOnce(Arc<Tested>, Log, String) -> F + Send) {
    run_with(Conntrack::spawn, test);
}

/// The same with this conntrack handle.
fn run_with<F: Future<Output = ()>>(
    conntrack: impl FnOnce() -> std::io::Result<Conntrack> + Send,
    test: impl FnOnce(Arc<Tested>, Log, String) -> F + Send,
) {
    std::thread::scope(|scope| {
        let of_pod = scope.spawn(|| {
            unshare(CloneFlags::CLONE_NEWNET)
                .expect("these tests make network namespaces: run them as root");
            let path = format!("/proc/self/task/{}/ns/net", nix::unistd::gettid());
            File::open(path).expect("the namespace of the pod")
        });
        let of_pod = of_pod.join().expect("a namespace");
        let node = scope.spawn(move || {
            unshare(CloneFlags::CLONE_NEWNET)
                .expect("these tests make network namespaces: run them as root");
            let runtime = tokio::runtime::Builder::new_current_thread()
                .enable_all()
                .build()
                .expect("a runtime");
            let (folder, log) = (TempDir::new().expect("a folder"), Log::default());
            let (_mtu, mtu) = watch::channel(1400);
            let parts = ServiceParts {
                enforcer: log.clone(),
                addresses: log.clone(),
                announcer: log.clone(),
                links: LinkRemover::spawn().expect("a thread"),
                conntrack: conntrack().expect("a thread"),
                mtu,
                policy_timeout: Duration::from_secs(20),
            };
            let attachments = Attachments::load(folder.path()).expect("an empty folder");
            let path = format!("/proc/self/fd/{}", std::os::fd::AsRawFd::as_raw_fd(&of_pod));
            runtime.block_on(test(Arc::new(Service::new(parts, attachments)), log, path));
        });
        node.join()
            .unwrap_or_else(|panic| std::panic::resume_unwind(panic));
    });
}

fn mk_call() -> CniCall {
    CniCall {
        network: "net".to_owned(),
        config: Config::default(),
        timeout_millis: 0,
    }
}

fn mk_asked(netns: &str) -> cni::Attachment {
    let pod = cni::Pod {
        namespace: "x".to_owned(),
        name: "a".to_owned(),
        ..cni::Pod::default()
    };
    cni::Attachment {
        container_id: "c1".to_owned(),
        ifname: "eth0".to_owned(),
        netns: netns.to_owned(),
        pod: Some(pod),
    }
}

#[test]
fn a_del_waits_for_the_add_before_it_and_takes_back_what_that_made() {
    run(|service, log, netns| async move {
        let asked = mk_asked(&netns);
        let pod = service.pod_lock(&EndpointKey::new("x", "a"));
        let add = pod.lock().await;
        let deleting = {
            let (service, asked) = (service.clone(), asked.clone());
            tokio::spawn(async move { service.del(&mk_call(), &asked).await })
        };
        tokio::task::yield_now().await;
        assert_eq!(log.take(), Vec::<String>::new(), "the ADD is not over");
        let made = request::new_attachment("net", &asked).expect("a pod");
        service.attachments().put(made).expect("a file");
        drop(add);
        deleting.await.expect("no panic").expect("DEL");
        let mut done = log.take();
        done.sort();
        assert_eq!(done, ["detach x/a", "release net.c1", "withdraw x/a"]);
        let id = AttachmentId {
            container: "c1".to_owned(),
            ifname: "eth0".to_owned(),
        };
        assert_eq!(service.attachments().get(&id), None);
    });
}

#[test]
fn a_repeated_add_announces_again() {
    run(|service, log, netns| async move {
        let asked = mk_asked(&netns);
        let first = service.add(&mk_call(), &asked).await.expect("ADD");
        assert_eq!(log.take(), ["assign net.c1", "attach x/a", "announce x/a"]);
        assert_eq!(
            service.add(&mk_call(), &asked).await.expect("the same"),
            first
        );
        assert_eq!(log.take(), ["attach x/a", "announce x/a"]);
        service.del(&mk_call(), &asked).await.expect("DEL");
    });
}

#[test]
fn an_address_whose_connections_cannot_be_ended_is_not_assigned() {
    run_with(Conntrack::refusing, |service, log, netns| async move {
        let asked = mk_asked(&netns);
        let refusal = service
            .add(&mk_call(), &asked)
            .await
            .expect_err("old connections would bypass policy");
        assert_eq!(refusal.code, code::TRY_AGAIN);
        assert!(
            refusal.msg.contains("conntrack entries of 10.0.0.1") && refusal.msg.contains("EPERM"),
            "{refusal}"
        );
        assert_eq!(
            log.take(),
            ["assign net.c1", "detach x/a"],
            "policy was not opened, and the address is kept until they are"
        );
        let refusal = service
            .del(&mk_call(), &asked)
            .await
            .expect_err("the runtime tries again");
        assert_eq!(refusal.code, code::TRY_AGAIN);
        assert_eq!(log.take(), ["detach x/a"]);
    });
}

fn put(service: &Tested, asked: &cni::Attachment, pod: &str) -> Attachment {
    let mut other = request::new_attachment("net", asked).expect("a pod");
    other.pod = pod.to_owned();
    other.addresses = vec!["10.0.0.2/32".parse().expect("an address")];
    service.attachments().put(other.clone()).expect("a file");
    service.attachments().finish(&other.id).expect("a file");
    other
}

/// The names of two pods may have the same hash, by chance or because a tenant searched for it.
#[test]
fn a_pod_whose_interface_another_one_has_is_refused_and_the_other_stays() {
    run(|service, log, netns| async move {
        let victim = put(
            &service,
            &cni::Attachment {
                container_id: "c0".to_owned(),
                ..mk_asked(&netns)
            },
            "victim",
        );
        let refusal = service
            .add(&mk_call(), &mk_asked(&netns))
            .await
            .expect_err("its link is another's");
        assert!(
            refusal.msg.contains("x/victim") && refusal.msg.contains("x/a"),
            "{refusal}"
        );
        assert_eq!(log.take(), Vec::<String>::new(), "nothing was done");
        assert!(
            service
                .attachments()
                .get(&victim.id)
                .is_some_and(|victim| victim.is_finished)
        );
        service
            .del(&mk_call(), &mk_asked(&netns))
            .await
            .expect("DEL of what was refused");
        assert_eq!(log.take(), ["release net.c1"]);
    });
}

/// As Multus calls: all its delegates get the same pod and sandbox.
#[test]
fn a_second_interface_of_a_pod_is_refused_and_the_first_stays() {
    run(|service, log, netns| async move {
        let first = service
            .add(&mk_call(), &mk_asked(&netns))
            .await
            .expect("ADD");
        let second = cni::Attachment {
            ifname: "net1".to_owned(),
            ..mk_asked(&netns)
        };
        log.take();
        let refusal = service
            .add(&mk_call(), &second)
            .await
            .expect_err("one is enough");
        assert!(
            refusal.msg.contains("net1") && refusal.msg.contains("eth0"),
            "{refusal}"
        );
        service
            .del(&mk_call(), &second)
            .await
            .expect("DEL of what was refused");
        assert_eq!(
            log.take(),
            Vec::<String>::new(),
            "the address is the first one's"
        );
        assert_eq!(
            service
                .add(&mk_call(), &mk_asked(&netns))
                .await
                .expect("it is there"),
            first
        );
        service
            .check(&mk_call(), &mk_asked(&netns))
            .await
            .expect("as it was made");
    });
}

#[test]
fn an_earlier_sandbox_of_the_pod_makes_way() {
    run(|service, log, netns| async move {
        let earlier = cni::Attachment {
            container_id: "c0".to_owned(),
            ifname: "eth9".to_owned(),
            ..mk_asked(&netns)
        };
        let earlier = put(&service, &earlier, "a");
        service
            .add(&mk_call(), &mk_asked(&netns))
            .await
            .expect("ADD");
        let done = log.take();
        assert_eq!(done[..3], ["detach x/a", "release net.c0", "withdraw x/a"]);
        assert_eq!(service.attachments().get(&earlier.id), None);
    });
}
