//! The model of the disk is held to the real file system: the same behaviours from both.

#![allow(clippy::unwrap_used, reason = "a test that cannot go on panics")]

use std::{
    io::ErrorKind,
    path::Path,
    process::{Command, Stdio},
};

use thalweg_store::disk::{Directory, Disk, ForgetfulDisk};

/// Set for the process that is killed: the directory that it writes to.
const VICTIM: &str = "THALWEG_FILES_VICTIM";

fn both(behaviour: impl Fn(&dyn Disk)) {
    behaviour(&ForgetfulDisk::default());
    let directory = tempfile::tempdir().unwrap();
    behaviour(&Directory::create(directory.path()).unwrap());
}

fn bytes(disk: &dyn Disk, name: &str, offset: u64, len: usize) -> Vec<u8> {
    let mut bytes = vec![0; len];
    disk.open(name).unwrap().read_at(&mut bytes, offset).unwrap();
    bytes
}

#[test]
fn what_is_written_is_read_by_every_handle() {
    both(|disk| {
        let file = disk.open("a").unwrap();
        assert!(file.is_empty().unwrap());
        file.write_at(&[b"one", b"", b"two"], 0).unwrap();
        assert_eq!(file.len().unwrap(), 6);
        assert_eq!(bytes(disk, "a", 0, 6), b"onetwo", "by another handle, before any sync");
        file.write_at(&[b"XY"], 2).unwrap();
        assert_eq!(bytes(disk, "a", 0, 6), b"onXYwo");
        file.sync().unwrap();
        assert_eq!(bytes(disk, "a", 3, 3), b"Ywo");
    });
}

#[test]
fn a_gap_is_zeros_and_the_end_is_an_error() {
    both(|disk| {
        let file = disk.open("a").unwrap();
        file.write_at(&[b"end"], 5).unwrap();
        assert_eq!(bytes(disk, "a", 0, 8), b"\0\0\0\0\0end");
        for (offset, len) in [(8, 1), (6, 3), (100, 1)] {
            let error = file.read_at(&mut vec![0; len], offset).unwrap_err();
            assert_eq!(error.kind(), ErrorKind::UnexpectedEof, "{len} bytes at {offset}");
        }
        file.read_at(&mut [], 8).unwrap();
    });
}

#[test]
fn a_removed_file_is_gone_by_name_only() {
    both(|disk| {
        let old = disk.open("a").unwrap();
        old.write_at(&[b"old"], 0).unwrap();
        disk.open("b").unwrap();
        disk.remove("a").unwrap();
        disk.remove("a").unwrap();
        assert_eq!(disk.list().unwrap(), ["b"]);
        let new = disk.open("a").unwrap();
        assert!(new.is_empty().unwrap(), "a new file");
        new.write_at(&[b"new"], 0).unwrap();
        let mut names = disk.list().unwrap();
        names.sort();
        assert_eq!(names, ["a", "b"]);
        let mut bytes = [0; 3];
        old.read_at(&mut bytes, 0).unwrap();
        assert_eq!(&bytes, b"old", "whoever has it open keeps it");
        disk.sync_names().unwrap();
    });
}

#[test]
fn a_kill_loses_nothing_that_was_written() {
    if let Some(directory) = std::env::var_os(VICTIM) {
        // The child: writes, syncs nothing, and is killed where it stands.
        let disk = Directory::create(Path::new(&directory)).unwrap();
        disk.open("a").unwrap().write_at(&[b"written"], 3).unwrap();
        println!("written");
        loop {
            std::thread::park();
        }
    }
    let directory = tempfile::tempdir().unwrap();
    let test = "a_kill_loses_nothing_that_was_written";
    let mut child = Command::new(std::env::current_exe().unwrap())
        .args([test, "--exact", "--nocapture"])
        .env(VICTIM, directory.path())
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let mut output = std::io::BufReader::new(child.stdout.take().unwrap());
    let mut line = String::new();
    while !line.contains("written") {
        line.clear();
        assert!(std::io::BufRead::read_line(&mut output, &mut line).unwrap() > 0, "the child ended");
    }
    child.kill().unwrap();
    child.wait().unwrap();
    let real = Directory::create(directory.path()).unwrap();
    assert_eq!(bytes(&real, "a", 0, 10), b"\0\0\0written");
    // In the model the process is its handles.
    let model = ForgetfulDisk::default();
    model.open("a").unwrap().write_at(&[b"written"], 3).unwrap();
    assert_eq!(bytes(&model, "a", 0, 10), b"\0\0\0written");
}
