use proptest::prelude::*;

use super::*;
use crate::attributes::{AsPath, Origin};

fn sender(last: u8, is_internal: bool) -> Option<Sender> {
    let address = Ipv4Addr::new(10, 0, 0, last);
    Some(Sender {
        is_internal,
        router_id: address,
        address: address.into(),
    })
}

fn attributes(path: &[u32]) -> Attributes {
    let mut attributes = Attributes::local(IpAddr::from(Ipv4Addr::LOCALHOST));
    attributes.as_path = AsPath::sequence(path);
    attributes
}

type Change = fn(&mut Attributes);

/// Two paths that are equal up to a step, where the first one is better by what the row names.
#[test]
fn each_step_decides_where_those_before_it_do_not() {
    let none: Change = |_| {};
    let rows: [(&str, Change, Change); 8] = [
        ("local preference", |a| a.local_pref = Some(101), none),
        ("shorter path", |a| a.as_path = AsPath::sequence(&[1]), none),
        ("origin", none, |a| a.origin = Origin::Incomplete),
        (
            "MED of one neighbour",
            |a| a.med = Some(5),
            |a| a.med = Some(6),
        ),
        ("no MED is the best", none, |a| a.med = Some(1)),
        (
            "originator",
            |a| a.originator_id = Some(Ipv4Addr::new(9, 0, 0, 1)),
            none,
        ),
        (
            "path before MED",
            |a| a.as_path = AsPath::sequence(&[1]),
            |a| a.local_pref = Some(99),
        ),
        (
            "local preference before path",
            |a| a.local_pref = Some(200),
            |a| a.as_path = AsPath::default(),
        ),
    ];
    for (what, better, worse) in rows {
        let (mut one, mut other) = (attributes(&[1, 2]), attributes(&[1, 2]));
        better(&mut one);
        worse(&mut other);
        // The other one's identifier and address are smaller.
        let one = Contender {
            attributes: &one,
            sender: sender(9, true),
            metric: 1,
        };
        let other = Contender {
            attributes: &other,
            sender: sender(3, true),
            metric: 1,
        };
        assert_eq!(select(&[one, other])[0], 0, "{what}");
        assert_eq!(select(&[other, one])[0], 1, "{what}");
    }
}

#[test]
fn where_a_path_comes_from_decides_before_its_cost() {
    let plain = attributes(&[1]);
    let contender = |sender, metric| Contender {
        attributes: &plain,
        sender,
        metric,
    };
    let rows = [
        (
            "external",
            contender(sender(9, false), 9),
            contender(sender(1, true), 1),
            vec![0],
        ),
        (
            "cost",
            contender(sender(9, true), 1),
            contender(sender(1, true), 2),
            vec![0],
        ),
        (
            "local",
            contender(None, 9),
            contender(sender(1, false), 1),
            vec![0],
        ),
        (
            "both",
            contender(sender(9, true), 1),
            contender(sender(1, true), 1),
            vec![1, 0],
        ),
    ];
    for (what, one, other, expected) in rows {
        assert_eq!(select(&[one, other]), expected, "{what}");
    }
    assert_eq!(select(&[]), Vec::<usize>::new());
}

#[test]
fn a_shorter_cluster_list_is_preferred_among_one_originator() {
    let mut near = attributes(&[]);
    near.originator_id = Some(Ipv4Addr::new(1, 1, 1, 1));
    let mut far = near.clone();
    near.cluster_list = vec![Ipv4Addr::new(2, 2, 2, 2)];
    far.cluster_list = vec![Ipv4Addr::new(2, 2, 2, 2); 2];
    let near = Contender {
        attributes: &near,
        sender: sender(9, true),
        metric: 0,
    };
    let far = Contender {
        attributes: &far,
        sender: sender(1, true),
        metric: 0,
    };
    assert_eq!(select(&[far, near]), vec![1, 0]);
}

/// The case that a comparison of pairs decides by order: of A 65001 MED 10, B 65002 MED 0 and C
/// 65001 MED 5, each beats another one.
#[test]
fn med_of_different_neighbours_is_not_compared() {
    let mut paths = [
        attributes(&[65001, 9]),
        attributes(&[65002, 9]),
        attributes(&[65001, 8]),
    ];
    for (path, med) in paths.iter_mut().zip([10, 20, 5]) {
        path.med = Some(med);
    }
    let contenders: Vec<Contender<'_>> = paths
        .iter()
        .zip([1, 2, 3])
        .map(|(attributes, last)| Contender {
            attributes,
            sender: sender(last, false),
            metric: 0,
        })
        .collect();
    assert_eq!(select(&contenders), vec![1, 2]);
}

fn any_contender() -> impl Strategy<Value = (Attributes, bool, u32)> {
    let path = prop::collection::vec(1u32..4, 0..3);
    let numbers = (0u32..3, 0u32..3, 0u32..2, 0u8..3, any::<bool>());
    (path, numbers).prop_map(|(path, (med, pref, metric, origin, is_internal))| {
        let mut attributes = attributes(&path);
        attributes.med = (med > 0).then_some(med);
        attributes.local_pref = (pref > 0).then_some(99 + pref);
        attributes.origin = [Origin::Igp, Origin::Egp, Origin::Incomplete][usize::from(origin)];
        (attributes, is_internal, metric)
    })
}

proptest! {
    /// The same paths are chosen in whatever order they stand, and none is worse than another one
    /// that is left out for it.
    #[test]
    fn order_does_not_matter(
        paths in prop::collection::vec(any_contender(), 1..7),
        order in Just((0..7usize).collect::<Vec<_>>()).prop_shuffle(),
    ) {
        let contenders: Vec<Contender<'_>> = paths
            .iter()
            .enumerate()
            .map(|(index, (attributes, is_internal, metric))| Contender {
                attributes,
                sender: sender(u8::try_from(index).unwrap(), *is_internal),
                metric: *metric,
            })
            .collect();
        let order: Vec<usize> = order
            .into_iter()
            .filter(|index| *index < contenders.len())
            .collect();
        let shuffled: Vec<Contender<'_>> = order.iter().map(|index| contenders[*index]).collect();
        let chosen = select(&contenders);
        let again: Vec<usize> = select(&shuffled).into_iter().map(|index| order[index]).collect();
        prop_assert_eq!(&chosen, &again);
        prop_assert!(!chosen.is_empty());
        // Paths that lose, when they are taken away, change nothing.
        let kept: Vec<Contender<'_>> = chosen.iter().map(|index| contenders[*index]).collect();
        prop_assert_eq!(select(&kept).len(), chosen.len());
    }
}
