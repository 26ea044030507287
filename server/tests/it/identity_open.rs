//! Whose a data directory is: what opens, what is refused and how that is said, and that no crash lets
//! a start count be used twice.

use std::io;
use std::path::Path;
use std::sync::Arc;

use coracle_raft::types::NodeId;
use coracle_server::identity::{ClusterId, Error, Fresh, Identity, Locking, Opened};
use coracle_storage::fs::faulty::{FaultyFs, Loss};
use coracle_storage::fs::{read_file, write_file_atomic};
use coracle_storage::{File, Fs, OpenMode, RealFs, Space};
use rand::SeedableRng;
use rand::rngs::StdRng;

const DIR: &str = "/srv/data";

fn cluster() -> ClusterId {
    ClusterId::parse("0b6b2a3e-1c7d-4f00-8a11-5e5e5e5e5e5e").expect("an id")
}

fn open(fs: &FaultyFs) -> Result<Opened, Error> {
    Identity::open(Arc::new(fs.clone()), Path::new(DIR), Locking::None)
}

fn fresh(opened: Opened) -> Fresh {
    match opened {
        Opened::Fresh(fresh) => fresh,
        Opened::Existing(identity) => panic!("already {identity:?}"),
    }
}

fn existing(opened: Opened) -> Identity {
    match opened {
        Opened::Existing(identity) => identity,
        Opened::Fresh(fresh) => panic!("nobody's: {fresh:?}"),
    }
}

fn adopted() -> FaultyFs {
    let fs = FaultyFs::new(7);
    fresh(open(&fs).expect("opens")).adopt(cluster(), NodeId(3), 99).expect("adopts");
    fs
}

fn refused(fs: &FaultyFs) -> Error {
    open(fs).expect_err("the directory is not to be used")
}

fn put(fs: &FaultyFs, path: &str) {
    let file = fs.open(Path::new(path), OpenMode::CreateNew).expect("creates");
    file.write_at(b"x", 0).expect("writes");
}

#[test]
fn an_identity_stays_and_every_start_is_counted() {
    let fs = FaultyFs::new(1);
    let identity =
        fresh(open(&fs).expect("opens")).adopt(cluster(), NodeId(3), 99).expect("adopts");
    assert_eq!(identity.start_count(), 1);
    drop(identity);
    for start in 2..5 {
        let identity = existing(open(&fs).expect("opens"));
        assert_eq!(identity.cluster_id(), &cluster());
        assert_eq!((identity.node_id(), identity.hash_seed()), (NodeId(3), 99));
        assert_eq!(identity.start_count(), start);
    }
}

/// Golden: releases to come have to read it.
#[test]
fn the_file_is_text() {
    let bytes = read_file(&adopted(), &Path::new(DIR).join("IDENTITY")).expect("reads");
    assert_eq!(
        String::from_utf8(bytes).expect("text"),
        "# Who this node is. Written by the node at every start; never copy or edit it.\n\
         format = 1\n\
         cluster = 0b6b2a3e-1c7d-4f00-8a11-5e5e5e5e5e5e\n\
         node = 3\n\
         hash_seed = 99\n\
         start_count = 1\n\
         crc = e2805066\n"
    );
}

/// The machine dies at every single operation of a first and of a second start, and may lose, keep or
/// tear what was not synced: the directory opens again, and a count that a start has shown is never
/// shown again.
#[test]
fn no_crash_takes_an_identity_back_or_a_count_twice() {
    let losses = [Loss::All, Loss::Subset, Loss::Nothing];
    let mut crashes = 0;
    for loss in losses {
        for op in 1.. {
            let fs = FaultyFs::new(op);
            fs.crash_at(op);
            let shown = life(&fs);
            if !fs.crashed() {
                assert_eq!(shown, Some(2), "both starts went well");
                break;
            }
            crashes += 1;
            let after = fs.crash(loss);
            match (open(&after).expect("a crash damages nothing"), shown) {
                (Opened::Existing(identity), shown) => {
                    assert_eq!(identity.node_id(), NodeId(3));
                    assert!(Some(identity.start_count()) > shown, "op {op}, {loss:?}");
                }
                (Opened::Fresh(_), shown) => {
                    assert_eq!(shown, None, "op {op}, {loss:?}: an identity was taken back");
                }
            }
        }
    }
    assert!(crashes > 3 * 10, "only {crashes} crashes: is the machine ever killed?");
}

/// Adoption and one more start; returns the last start count that was shown.
fn life(fs: &FaultyFs) -> Option<u64> {
    let Ok(Opened::Fresh(fresh)) = open(fs) else {
        return None;
    };
    let first = fresh.adopt(cluster(), NodeId(3), 99).ok()?.start_count();
    match open(fs) {
        Ok(Opened::Existing(identity)) => Some(identity.start_count()),
        _ => Some(first),
    }
}

#[test]
fn somebody_elses_directory_is_left_alone() {
    let fs = FaultyFs::new(1);
    fs.create_dir_all(Path::new(DIR)).expect("makes it");
    for name in ["a.txt", "b.txt", "c.txt", "d.txt"] {
        put(&fs, &format!("{DIR}/{name}"));
    }
    assert_eq!(
        refused(&fs).to_string(),
        "/srv/data is not a data directory of Coracle: it holds a.txt, b.txt, c.txt and 1 more, and \
         no IDENTITY; name an empty or new directory with --data-dir"
    );
    assert_eq!(fs.read_dir(Path::new(DIR)).expect("lists").len(), 4, "nothing was put there");
}

#[test]
fn what_an_interrupted_start_or_mkfs_leaves_does_no_harm() {
    let fs = FaultyFs::new(1);
    fs.create_dir_all(&Path::new(DIR).join("lost+found")).expect("makes it");
    for name in ["LOCK", "IDENTITY.new", "PROBE", "PEERS", "INIT"] {
        put(&fs, &format!("{DIR}/{name}"));
    }
    fresh(open(&fs).expect("opens")).adopt(cluster(), NodeId(1), 0).expect("adopts");
}

#[test]
fn data_without_an_identity_are_not_taken_for_a_new_node() {
    let fs = FaultyFs::new(1);
    fs.create_dir_all(&Path::new(DIR).join("log")).expect("makes it");
    let error = refused(&fs);
    assert!(matches!(error, Error::Beheaded { .. }), "{error}");
    assert!(error.to_string().contains("holds log but no IDENTITY"), "{error}");
}

#[test]
fn every_flipped_bit_is_found() {
    let path = Path::new(DIR).join("IDENTITY");
    let len = read_file(&adopted(), &path).expect("reads").len() as u64;
    for offset in 0..len {
        let fs = adopted();
        fs.flip_bit(&path, offset, (offset % 8) as u8);
        let error = refused(&fs);
        assert!(matches!(error, Error::Damaged { .. }), "byte {offset}: {error}");
    }
    let fs = adopted();
    fs.flip_bit(&path, 90, 0);
    assert_eq!(
        refused(&fs).to_string(),
        "/srv/data/IDENTITY is damaged: its checksum does not match. Start this node empty in a new \
         directory: its cluster rebuilds its replicas"
    );
}

#[test]
fn every_cut_file_is_found() {
    let path = Path::new(DIR).join("IDENTITY");
    let whole = read_file(&adopted(), &path).expect("reads");
    for len in 0..whole.len() {
        let fs = adopted();
        write_file_atomic(&fs, &path, &whole[..len]).expect("writes");
        assert!(matches!(refused(&fs), Error::Damaged { .. }), "{len} bytes");
    }
}

fn rewrite(fs: &FaultyFs, from: &str, to: &str) {
    let path = Path::new(DIR).join("IDENTITY");
    let text = String::from_utf8(read_file(fs, &path).expect("reads")).expect("text");
    let (body, _) = text.rsplit_once("crc = ").expect("a checksum");
    assert!(body.contains(from));
    let body = body.replace(from, to);
    let whole = format!("{body}crc = {:08x}\n", crc32fast::hash(body.as_bytes()));
    write_file_atomic(fs, &path, whole.as_bytes()).expect("writes");
}

#[test]
fn a_newer_format_is_not_guessed_at() {
    let fs = adopted();
    rewrite(&fs, "format = 1\n", "format = 2\nshape = round\n");
    assert_eq!(
        refused(&fs).to_string(),
        "/srv/data/IDENTITY has format 2, this program reads up to 1: start the newer release that \
         wrote it"
    );
}

#[test]
fn fields_that_make_no_sense_are_damage() {
    for (from, to, why) in [
        ("node = 3\n", "", "node is missing"),
        ("node = 3\n", "node = x\n", "node is \"x\", not a number"),
        ("cluster = 0b6", "cluster = 0B6", "is no cluster id"),
        ("hash_seed = 99\n", "hash_seed = 99\nextra = 1\n", "start_count is missing"),
        ("start_count = 1\n", "start_count = 1\nextra = 1\n", "extra does not belong there"),
        ("node = 3\n", "node 3\n", "is no \"key = value\""),
    ] {
        let fs = adopted();
        rewrite(&fs, from, to);
        let error = refused(&fs).to_string();
        assert!(error.contains(why), "{error}");
    }
}

#[test]
fn another_cluster_or_node_is_refused() {
    let identity = existing(open(&adopted()).expect("opens"));
    identity.expect(Some(&cluster()), Some(NodeId(3))).expect("it is that node");
    identity.expect(None, None).expect("any");
    let other = ClusterId::parse("ffffffff-1c7d-4f00-8a11-5e5e5e5e5e5e").expect("an id");
    let error = identity.expect(Some(&other), None).expect_err("another cluster");
    assert_eq!(
        error.to_string(),
        "/srv/data belongs to cluster 0b6b2a3e-1c7d-4f00-8a11-5e5e5e5e5e5e, not to \
         ffffffff-1c7d-4f00-8a11-5e5e5e5e5e5e: --data-dir or --join is wrong. A node never changes \
         its cluster; to join this one, start it in an empty directory"
    );
    let error = identity.expect(None, Some(NodeId(4))).expect_err("another node");
    assert_eq!(
        error.to_string(),
        "/srv/data belongs to node n3, not to n4: --data-dir is wrong, or the directory was copied. \
         A copy must never run; start n4 in its own directory"
    );
}

#[test]
fn a_full_disk_is_told_before_and_after_the_identity() {
    let fs = FaultyFs::new(1);
    fs.set_capacity(10);
    assert!(matches!(refused(&fs), Error::Full { .. }));
    let fs = adopted();
    fs.set_capacity(fs.used_bytes());
    let error = refused(&fs);
    assert!(error.to_string().contains("the disk is full: make room"), "{error}");
    fs.set_capacity(1 << 20);
    assert_eq!(existing(open(&fs).expect("opens")).start_count(), 2, "nothing was changed");
}

#[test]
fn cluster_ids_look_like_uuids_and_come_from_the_seed() {
    let id = |seed| ClusterId::generate(&mut StdRng::seed_from_u64(seed));
    assert_eq!(id(1), id(1));
    assert_ne!(id(1), id(2));
    for seed in 0..100 {
        let id = id(seed);
        assert_eq!(ClusterId::parse(id.as_str()), Some(id.clone()), "{id}");
        assert_eq!(id.as_str().as_bytes()[14], b'4', "{id}");
        assert!(b"89ab".contains(&id.as_str().as_bytes()[19]), "{id}");
    }
    for wrong in ["", "0b6b2a3e1c7d4f008a115e5e5e5e5e5e", "0B6b2a3e-1c7d-4f00-8a11-5e5e5e5e5e5e"] {
        assert_eq!(ClusterId::parse(wrong), None, "{wrong}");
    }
}

#[test]
fn one_process_at_a_time_on_a_real_disk() {
    let scratch = tempfile::tempdir().expect("a scratch directory");
    let dir = scratch.path().join("a/b");
    let open = || Identity::open(Arc::new(RealFs), &dir, Locking::Process);
    let held = fresh(open().expect("opens"));
    let error = open().expect_err("in use");
    let process = format!("is in use by process {}: stop it first", std::process::id());
    assert!(error.to_string().contains(&process), "{error}");
    let held = held.adopt(cluster(), NodeId(3), 99).expect("adopts");
    assert!(matches!(open(), Err(Error::InUse { .. })), "the lock goes over to the identity");
    drop(held);
    assert_eq!(existing(open().expect("opens")).start_count(), 2);
}

/// Root may write anywhere, so the refusal comes from a file system that says no.
#[test]
fn a_directory_that_cannot_be_written_is_told() {
    for (kind, says) in [
        (io::ErrorKind::ReadOnlyFilesystem, "remount it writable"),
        (io::ErrorKind::PermissionDenied, "(chown)"),
    ] {
        let fs: Arc<dyn Fs> = Arc::new(Sealed(FaultyFs::new(1), kind));
        let error = Identity::open(fs, Path::new(DIR), Locking::None).expect_err("not writable");
        assert!(matches!(error, Error::ReadOnly { .. }), "{error}");
        assert!(error.to_string().contains(says), "{error}");
    }
}

/// A file system on which no file can be made.
struct Sealed(FaultyFs, io::ErrorKind);

impl Fs for Sealed {
    fn open(&self, path: &Path, mode: OpenMode) -> io::Result<Arc<dyn File>> {
        match mode {
            OpenMode::Read => self.0.open(path, mode),
            OpenMode::ReadWrite | OpenMode::CreateNew => Err(self.1.into()),
        }
    }
    fn create_dir_all(&self, path: &Path) -> io::Result<()> {
        self.0.create_dir_all(path)
    }
    fn remove_file(&self, path: &Path) -> io::Result<()> {
        self.0.remove_file(path)
    }
    fn remove_dir_all(&self, path: &Path) -> io::Result<()> {
        self.0.remove_dir_all(path)
    }
    fn rename(&self, from: &Path, to: &Path) -> io::Result<()> {
        self.0.rename(from, to)
    }
    fn hard_link(&self, from: &Path, to: &Path) -> io::Result<()> {
        self.0.hard_link(from, to)
    }
    fn sync_dir(&self, path: &Path) -> io::Result<()> {
        self.0.sync_dir(path)
    }
    fn read_dir(&self, path: &Path) -> io::Result<Vec<String>> {
        self.0.read_dir(path)
    }
    fn exists(&self, path: &Path) -> bool {
        self.0.exists(path)
    }
    fn space(&self, path: &Path) -> io::Result<Space> {
        self.0.space(path)
    }
}
