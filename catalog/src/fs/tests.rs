//! What the disk does, and how it is made to fail.

use std::io::ErrorKind;
use std::sync::Arc;

use rustix::io::Errno;

use super::*;

#[test]
fn files_and_names() {
    let dir = tempfile::tempdir().unwrap();
    let disk = Disk;
    let (a, b) = (dir.path().join("x/y/a"), dir.path().join("x/y/b"));
    let parent = dir.path().join("x/y");
    assert_eq!(disk.list(&parent).unwrap_err().kind(), ErrorKind::NotFound);
    disk.create_dir_all(&parent).unwrap();
    disk.create_dir_all(&parent).unwrap();
    let mut file = disk.create(&a).unwrap();
    assert_eq!(disk.create(&a).unwrap_err().kind(), ErrorKind::AlreadyExists);
    file.write_all(b"hello").unwrap();
    file.write_all_at(b"J", 0).unwrap();
    file.write_all(b" world").unwrap();
    file.sync().unwrap();
    drop(file);
    let mut file = disk.open(&a).unwrap();
    file.write_all(b"!").unwrap();
    assert_eq!(disk.read(&a).unwrap(), b"Jello world!");
    assert_eq!((disk.read_start(&a, 5).unwrap(), disk.read_start(&a, 50).unwrap().len()), (b"Jello".to_vec(), 12));
    file.set_len(5).unwrap();
    file.write_all(b".").unwrap();
    assert_eq!(disk.read(&a).unwrap(), b"Jello.");
    file.allocate(100).unwrap();
    assert_eq!(disk.len(&a).unwrap(), 100);
    disk.hard_link(&a, &b).unwrap();
    assert_eq!(disk.hard_link(&a, &b).unwrap_err().kind(), ErrorKind::AlreadyExists);
    assert_eq!(disk.list(&parent).unwrap(), [a.clone(), b.clone()]);
    assert_eq!(disk.list(dir.path()).unwrap(), Vec::<PathBuf>::new());
    disk.rename(&a, &b).unwrap();
    disk.remove(&b).unwrap();
    disk.sync_dir(&parent).unwrap();
    assert_eq!(disk.remove(&b).unwrap_err().kind(), ErrorKind::NotFound);
}

fn faulty() -> (tempfile::TempDir, Faulty, Faults) {
    let dir = tempfile::tempdir().unwrap();
    let faults = Faults::default();
    (dir, Faulty::new(Arc::new(Disk), faults.clone()), faults)
}

#[test]
fn each_call_fails_as_it_was_told() {
    let check = |fault: Fault, at: usize, errno: Errno, left: &[u8]| {
        let (dir, fs, faults) = faulty();
        let path = dir.path().join("a");
        faults.at(at, fault);
        let write = || {
            let mut file = fs.create(&path)?;
            file.write_all(b"0123")?;
            file.sync()?;
            file.write_all(b"4567")?;
            file.sync()
        };
        assert_eq!(write().unwrap_err().raw_os_error(), Some(errno.raw_os_error()), "{fault:?} at {at}");
        assert_eq!(fs.read(&path).unwrap_or_default(), left, "{fault:?} at {at}");
        assert_eq!(faults.calls().len(), at + 1);
    };
    check(Fault::Full, 0, Errno::NOSPC, b"");
    check(Fault::Full, 1, Errno::NOSPC, b"");
    check(Fault::Short, 1, Errno::NOSPC, b"01");
    check(Fault::Short, 3, Errno::NOSPC, b"012345");
    check(Fault::Io, 3, Errno::IO, b"0123");
    check(Fault::Sync, 4, Errno::IO, b"0123");
    check(Fault::Io, 4, Errno::IO, b"01234567");
}

#[test]
fn room_is_taken_and_given_back() {
    let (dir, fs, faults) = faulty();
    let (a, b, c) = (dir.path().join("a"), dir.path().join("b"), dir.path().join("c"));
    faults.room(Some(10));
    let mut file = fs.create(&a).unwrap();
    file.write_all(b"01234567").unwrap();
    assert_eq!(file.write_all(b"8901").unwrap_err().kind(), ErrorKind::StorageFull);
    assert_eq!((faults.used(), fs.len(&a).unwrap()), (10, 10));
    fs.hard_link(&a, &b).unwrap();
    fs.remove(&a).unwrap();
    let mut other = fs.create(&c).unwrap();
    assert_eq!(other.allocate(1).unwrap_err().kind(), ErrorKind::StorageFull);
    fs.remove(&b).unwrap();
    other.allocate(9).unwrap();
    assert_eq!(faults.used(), 9);
    faults.room(None);
    other.allocate(20).unwrap();
    let calls = faults.calls();
    assert_eq!(calls.last(), Some(&Call { what: "allocate", path: c }));
    faults.always(Fault::Io);
    assert!(fs.sync_dir(dir.path()).is_err());
    faults.clear();
    fs.sync_dir(dir.path()).unwrap();
}

#[test]
fn a_folder_whose_name_could_not_be_synced_is_synced_again() {
    let dir = tempfile::tempdir().unwrap();
    let deep = dir.path().join("a/b/c");
    let mut synced = vec![];
    // Each sync fails once, as a power cut or a kill between the two would leave it.
    let mut fails = true;
    let mut tries = 0;
    let name = |p: &Path| p.file_name().map(|n| n.to_string_lossy().into_owned()).unwrap_or_default();
    loop {
        tries += 1;
        let made = create_dirs(&deep, &mut |parent| {
            if std::mem::replace(&mut fails, false) {
                return Err(Errno::IO.into());
            }
            fails = !synced.contains(&name(parent));
            synced.push(name(parent));
            Ok(())
        });
        if made.is_ok() || tries > 20 {
            break;
        }
    }
    assert!(deep.is_dir() && tries > 1);
    assert!(["a", "b", &name(dir.path())].iter().all(|n| synced.iter().any(|s| s == n)), "{synced:?}");
    // What is there counts once its own name is durable.
    assert!(create_dirs(&deep, &mut |_| Err(Errno::IO.into())).is_err());
    create_dirs(&deep, &mut |_| Err(Errno::ACCESS.into())).unwrap();
}
