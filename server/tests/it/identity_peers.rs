//! The known nodes: kept over crashes, and only the later start of each is believed.

use std::path::Path;

use coracle_raft::types::NodeId;
use coracle_server::identity::{Error, Peer, Peers};
use coracle_storage::Fs;
use coracle_storage::fs::faulty::{FaultyFs, Loss};
use coracle_storage::fs::read_file;

const DIR: &str = "/data";

fn peer(address: &str, start_count: u64) -> Peer {
    Peer {
        peer_address: address.to_owned(),
        client_address: "n2:7400".to_owned(),
        http_address: String::new(),
        zone: "b".to_owned(),
        start_count,
    }
}

fn disk() -> FaultyFs {
    let fs = FaultyFs::new(3);
    fs.create_dir_all(Path::new(DIR)).expect("makes it");
    fs.sync_dir(Path::new("/")).expect("syncs");
    fs
}

#[test]
fn they_are_kept_as_text() {
    let fs = disk();
    assert_eq!(Peers::load(&fs, Path::new(DIR)).expect("loads"), Peers::default());
    let mut peers = Peers::default();
    assert!(peers.hear(NodeId(2), peer("n2:7500", 4)));
    assert!(peers.hear(NodeId(11), peer("[::1]:7500", 1)));
    peers.save(&fs, Path::new(DIR)).expect("saves");
    let after = fs.crash(Loss::All);
    assert_eq!(Peers::load(&after, Path::new(DIR)).expect("loads"), peers);
    let text = read_file(&after, &Path::new(DIR).join("PEERS")).expect("reads");
    assert_eq!(
        String::from_utf8(text).expect("text"),
        "# The nodes that this node has met. Written by the node.\n\
         format = 1\n\
         peer = 2 start_count=4 peer=n2:7500 client=n2:7400 http= zone=b\n\
         peer = 11 start_count=1 peer=[::1]:7500 client=n2:7400 http= zone=b\n\
         crc = 0372343f\n"
    );
}

#[test]
fn only_a_later_start_is_believed() {
    let mut peers = Peers::default();
    assert!(peers.hear(NodeId(2), peer("a:1", 4)));
    assert!(!peers.hear(NodeId(2), peer("b:1", 4)));
    assert!(!peers.hear(NodeId(2), peer("b:1", 3)));
    assert!(peers.hear(NodeId(2), peer("b:1", 5)), "it has moved");
    assert_eq!(peers.get(NodeId(2)), Some(&peer("b:1", 5)));
    assert!(peers.forget(NodeId(2)) && !peers.forget(NodeId(2)));
}

/// What comes from the network cannot write a line or a field of its own into the file.
#[test]
fn words_that_would_break_the_file_are_not_kept() {
    for wrong in ["a:1 zone=x", "a:1\npeer = 9", "ä:1", &"a".repeat(300)] {
        let mut peers = Peers::default();
        assert!(!peers.hear(NodeId(2), peer(wrong, 1)), "{wrong:?}");
        assert_eq!(peers, Peers::default());
    }
    assert!(!Peers::default().hear(NodeId(0), peer("a:1", 1)), "0 is nobody");
}

#[test]
fn damage_is_told_with_the_mend() {
    let fs = disk();
    let mut peers = Peers::default();
    peers.hear(NodeId(2), peer("a:1", 1));
    peers.save(&fs, Path::new(DIR)).expect("saves");
    fs.flip_bit(&Path::new(DIR).join("PEERS"), 70, 1);
    let error = Peers::load(&fs, Path::new(DIR)).expect_err("damaged");
    assert!(matches!(error, Error::Damaged { .. }), "{error}");
    assert!(error.to_string().contains("or remove PEERS, which is learnt anew"), "{error}");
}
