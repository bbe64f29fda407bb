use super::*;

const V4: IpVersion = IpVersion::V4;

fn net(text: &str) -> IpNet {
    text.parse().expect("a prefix")
}

fn route(via: &str, metric: u32) -> Arc<LearnedRoute> {
    let hop = LearnedHop {
        via: via.parse().expect("an address"),
        link: 2,
    };
    Arc::new(LearnedRoute {
        hops: vec![hop],
        metric,
    })
}

/// A kernel that is what was written, by prefix and metric.
#[derive(Default)]
struct Kernel {
    routes: BTreeMap<(IpNet, u32), Arc<LearnedRoute>>,
    planned: BTreeSet<IpNet>,
}

impl Kernel {
    fn exec(&mut self, learned: &mut Learned) {
        learned.take_changes();
        if !learned.is_read {
            let found = self.routes.iter();
            learned.note_read(
                found
                    .map(|((net, _), route)| (*net, (**route).clone()))
                    .collect(),
            );
            learned.is_read = true;
        }
        while learned.has_work() {
            let nets: Vec<IpNet> = std::mem::take(&mut learned.pending).into_iter().collect();
            for op in learned.take_ops(&nets, &|net| self.planned.contains(net)) {
                match &op {
                    LearnedOp::Set(net, route) => {
                        drop(self.routes.insert((*net, route.metric), route.clone()));
                    }
                    LearnedOp::Remove(net, route) => {
                        drop(self.routes.remove(&(*net, route.metric)));
                    }
                }
                learned.note_result(op, None);
            }
        }
    }

    fn text(&self) -> Vec<String> {
        let hop = |route: &LearnedRoute| route.hops[0].via.to_string();
        let routes = self.routes.iter();
        routes
            .map(|((net, metric), route)| format!("{net} via {} metric {metric}", hop(route)))
            .collect()
    }
}

fn start() -> (Learned, LearnedRoutes) {
    Learned::new(|| ())
}

#[test]
fn changes_arrive_and_a_former_metric_goes() {
    let ((mut learned, routes), mut kernel) = (start(), Kernel::default());
    let (one, two) = (net("192.0.2.0/24"), net("198.51.100.0/24"));
    routes.begin();
    routes.complete(V4);
    routes.set([
        (one, Some(route("172.30.0.2", 1024))),
        (two, Some(route("172.30.0.3", 1024))),
    ]);
    kernel.exec(&mut learned);
    assert_eq!(
        kernel.text(),
        [
            "192.0.2.0/24 via 172.30.0.2 metric 1024",
            "198.51.100.0/24 via 172.30.0.3 metric 1024"
        ]
    );
    assert!(learned.is_in_force(&one));
    routes.set([(one, Some(route("172.30.0.2", 77))), (two, None)]);
    kernel.exec(&mut learned);
    assert_eq!(kernel.text(), ["192.0.2.0/24 via 172.30.0.2 metric 77"]);
    assert_eq!((learned.wanted, learned.installed), (1, 1));
    routes.clear();
    kernel.exec(&mut learned);
    assert!(kernel.routes.is_empty() && !learned.has(&one));
}

#[test]
fn what_an_earlier_process_left_stays_until_everything_has_come() {
    let mut kernel = Kernel::default();
    for (prefix, metric) in [
        ("192.0.2.0/24", 1024),
        ("198.51.100.0/24", 1024),
        ("198.51.100.0/24", 5),
    ] {
        let left = route("172.30.0.2", metric);
        kernel.routes.insert((net(prefix), metric), left);
    }
    let (mut learned, routes) = start();
    routes.begin();
    kernel.exec(&mut learned);
    assert_eq!(
        kernel.routes.len(),
        2,
        "of two metrics one stays: {:?}",
        kernel.text()
    );
    routes.set([(net("192.0.2.0/24"), Some(route("172.30.0.9", 1024)))]);
    kernel.exec(&mut learned);
    assert_eq!(kernel.routes.len(), 2);
    routes.complete(V4);
    kernel.exec(&mut learned);
    assert_eq!(kernel.text(), ["192.0.2.0/24 via 172.30.0.9 metric 1024"]);
}

#[test]
fn another_source_keeps_the_routes_of_the_one_before_until_it_is_complete() {
    let ((mut learned, routes), mut kernel) = (start(), Kernel::default());
    routes.begin();
    routes.complete(V4);
    routes.set([(net("192.0.2.0/24"), Some(route("172.30.0.2", 1024)))]);
    kernel.exec(&mut learned);
    routes.begin();
    kernel.exec(&mut learned);
    assert_eq!(kernel.routes.len(), 1);
    routes.complete(V4);
    kernel.exec(&mut learned);
    assert!(kernel.routes.is_empty());
}

#[test]
fn a_planned_route_hides_a_learnt_one() {
    let ((mut learned, routes), mut kernel) = (start(), Kernel::default());
    let prefix = net("10.1.0.0/26");
    kernel.planned.insert(prefix);
    routes.begin();
    routes.complete(V4);
    routes.set([(prefix, Some(route("172.30.0.2", 1024)))]);
    kernel.exec(&mut learned);
    assert!(kernel.routes.is_empty());
    kernel.planned.clear();
    learned.touch(&[prefix]);
    kernel.exec(&mut learned);
    assert_eq!(kernel.routes.len(), 1);
    kernel.planned.insert(prefix);
    learned.touch(&[prefix]);
    kernel.exec(&mut learned);
    assert!(kernel.routes.is_empty());
    assert_eq!((learned.wanted, learned.installed), (1, 0));
}

#[test]
fn what_the_kernel_lost_is_written_again() {
    let ((mut learned, routes), mut kernel) = (start(), Kernel::default());
    routes.begin();
    routes.complete(V4);
    routes.set([(net("192.0.2.0/24"), Some(route("172.30.0.2", 1024)))]);
    kernel.exec(&mut learned);
    kernel.routes.clear();
    let foreign = net("203.0.113.0/24");
    kernel
        .routes
        .insert((foreign, 1024), route("172.30.0.7", 1024));
    learned.mark_stale();
    kernel.exec(&mut learned);
    assert_eq!(kernel.text(), ["192.0.2.0/24 via 172.30.0.2 metric 1024"]);
}

#[test]
fn what_fails_is_reported_and_tried_again() {
    let (mut learned, routes) = start();
    let prefix = net("192.0.2.0/24");
    routes.begin();
    routes.set([(prefix, Some(route("172.30.0.2", 1024)))]);
    learned.take_changes();
    for op in learned.take_ops(&[prefix], &|_| false) {
        learned.note_result(op, Some(Errno::EHOSTUNREACH));
    }
    learned.publish();
    let seen = routes.watch().borrow().clone();
    assert_eq!((seen.wanted, seen.installed, seen.failed), (1, 0, 1));
    assert!(
        seen.failure
            .is_some_and(|text| text.starts_with("192.0.2.0/24: EHOSTUNREACH"))
    );
    assert!(learned.is_failing());
    learned.retry();
    assert!(learned.pending.contains(&prefix));
    assert_eq!(learned.take_ops(&[prefix], &|_| false).len(), 1);
    assert!(!learned.is_failing());
}

#[test]
fn messages_are_read_as_they_are_written() {
    let hop = |via: &str, link| LearnedHop {
        via: via.parse().expect("an address"),
        link,
    };
    for (prefix, hops) in [
        ("192.0.2.0/24", vec![hop("172.30.0.2", 2)]),
        (
            "0.0.0.0/0",
            vec![hop("172.30.0.2", 2), hop("172.30.0.3", 3)],
        ),
        ("192.0.2.0/24", vec![hop("fd01::2", 2)]),
        ("2001:db8::/32", vec![hop("fd01::2", 2), hop("fd01::3", 2)]),
        ("::/0", vec![hop("fd01::2", 2)]),
    ] {
        let wanted = LearnedRoute { hops, metric: 1024 };
        let found = parse_route(&new_route(&net(prefix), &wanted));
        assert_eq!(found, Some((net(prefix), wanted)), "{prefix}");
    }
    let mut foreign = new_route(&net("192.0.2.0/24"), &route("172.30.0.2", 1));
    foreign.header.protocol = RouteProtocol::Static;
    assert_eq!(parse_route(&foreign), None);
}
