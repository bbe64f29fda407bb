use super::*;

/// Path to content of every file of an archive.
fn unpack(data: &[u8]) -> BTreeMap<String, Vec<u8>> {
    let mut files = BTreeMap::new();
    for entry in tar::Archive::new(data).entries().unwrap() {
        let mut entry = entry.unwrap();
        let path = entry.path().unwrap().to_string_lossy().into_owned();
        let mut content = Vec::new();
        entry.read_to_end(&mut content).unwrap();
        files.insert(path, content);
    }
    files
}

fn mk_image(folder: &Path, order: &[usize]) -> Vec<u8> {
    std::fs::write(folder.join("program"), b"not really a program").unwrap();
    let source = folder.join("program");
    let entries = [
        format!("{}=usr/bin/program", source.display()),
        "@/usr/bin/program=bin/alias".to_owned(),
        format!("{}=/deep/er/program", source.display()),
    ];
    let image = Image {
        name: "margay.test/image:1".into(),
        entries: order
            .iter()
            .map(|&at| entries[at].parse().unwrap())
            .collect(),
        entrypoint: vec!["/usr/bin/program".into()],
    };
    let out = folder.join("image.tar");
    image.write(&out).unwrap();
    std::fs::read(out).unwrap()
}

#[test]
fn every_reference_is_the_digest_of_what_it_names() {
    let folder = tempfile::tempdir().unwrap();
    let files = unpack(&mk_image(folder.path(), &[0, 1, 2]));
    let json = |data: &[u8]| serde_json::from_slice::<serde_json::Value>(data).unwrap();
    let follow = |reference: &serde_json::Value| {
        let wanted = reference["digest"].as_str().unwrap();
        let content = &files[&blob(wanted)];
        assert_eq!(digest(content), wanted);
        assert_eq!(content.len() as u64, reference["size"].as_u64().unwrap());
        content.clone()
    };
    let reference = &json(&files["index.json"])["manifests"][0];
    assert_eq!(
        reference["annotations"]["io.containerd.image.name"],
        "margay.test/image:1"
    );
    let manifest = json(&follow(reference));
    let config = json(&follow(&manifest["config"]));
    assert_eq!(
        config["rootfs"]["diff_ids"][0],
        manifest["layers"][0]["digest"]
    );
    let layer = unpack(&follow(&manifest["layers"][0]));
    assert_eq!(layer["deep/er/program"], b"not really a program");
    assert!(
        layer.contains_key("bin/alias")
            && layer.contains_key("deep/er")
            && layer.contains_key("proc")
    );
    assert_eq!(files["oci-layout"], br#"{"imageLayoutVersion":"1.0.0"}"#);
}

#[test]
fn the_order_of_entries_does_not_show() {
    let (first, second) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    assert_eq!(
        mk_image(first.path(), &[0, 1, 2]),
        mk_image(second.path(), &[2, 0, 1])
    );
}

#[test]
fn bad_entries_and_names_are_refused() {
    for text in ["no-destination", "source=", "source=../up", "source=/"] {
        assert!(text.parse::<Entry>().is_err(), "{text}");
    }
    let folder = tempfile::tempdir().unwrap();
    for name in ["image", "image:1", "host/image", "host:80/image"] {
        let image = Image {
            name: name.into(),
            entries: Vec::new(),
            entrypoint: Vec::new(),
        };
        assert!(image.write(&folder.path().join("out")).is_err(), "{name}");
    }
}
