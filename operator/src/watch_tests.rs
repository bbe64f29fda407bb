use super::*;

fn object(value: Value) -> DynamicObject {
    serde_json::from_value(value).unwrap()
}

#[test]
fn only_fields_that_are_read_are_kept_in_memory() {
    let full = || {
        object(json!({
            "metadata": { "name": "a", "managedFields": [{ "manager": "kubelet" }] },
            "spec": { "unschedulable": true },
            "status": {
                "images": [1, 2, 3],
                "addresses": [{ "type": "InternalIP", "address": "192.0.2.1" }],
            },
        }))
    };
    let mut node = full();
    strip("Node", &mut node);
    let addresses = json!([{ "type": "InternalIP", "address": "192.0.2.1" }]);
    assert_eq!(
        node.data,
        json!({ "spec": { "unschedulable": true }, "status": { "addresses": addresses } })
    );
    assert_eq!(node.metadata.managed_fields, None);
    let mut pod = full();
    strip("Pod", &mut pod);
    assert!(pod.data["status"].is_object());
    let mut installation = full();
    strip("Installation", &mut installation);
    assert!(installation.metadata.managed_fields.is_some());
}

#[test]
fn the_order_of_events_does_not_matter() {
    let pods: Vec<DynamicObject> = (0..50)
        .map(|i| object(json!({ "metadata": { "name": format!("p{i:02}"), "namespace": "a" } })))
        .collect();
    let read = |events: Vec<&DynamicObject>| {
        let mut writer = reflector::store::Writer::<DynamicObject>::new(
            kind("Pod").resource(margay_api::storage::Mode::V3),
        );
        let store = writer.as_reader();
        for pod in events {
            writer.apply_watcher_event(&watcher::Event::Apply(pod.clone()));
        }
        let names: Vec<String> = in_order(&store).iter().map(|pod| pod.name_any()).collect();
        names
    };
    let forward = read(pods.iter().collect());
    assert_eq!(forward.len(), 50);
    assert_eq!(
        forward,
        read(pods.iter().rev().chain(&pods[10..20]).collect())
    );
    assert!(forward.is_sorted());
}
