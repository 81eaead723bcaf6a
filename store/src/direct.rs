//! The direct door: the same requests over a Unix socket in the data directory.
//!
//! A commit over NATS crosses the broker twice, which is most of what it costs. Invokers on the store's
//! host take this way instead and fall back to NATS wherever it is not open. Nothing else differs: the
//! requests, their frames and their answers are the same, and may be repeated on either way.
//!
//! A message is the number of its request (u64), its length (u32), both little-endian, and a frame. The
//! first one comes from the store: number 0 and, in place of a frame, the 16 bytes of its identity.

use std::{
    collections::HashMap,
    io,
    os::unix::fs::PermissionsExt as _,
    path::{Path, PathBuf},
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use bytes::{BufMut as _, Bytes, BytesMut};
use thalweg_protocol::{StoreId, limits};
use tokio::{
    io::{AsyncRead, AsyncReadExt as _, AsyncWrite, AsyncWriteExt as _},
    net::{UnixListener, UnixStream},
    sync::{Semaphore, mpsc, oneshot},
    time::Instant,
};
use tokio_util::sync::CancellationToken;

use crate::{LocalStore, StoreError, server::answer};

/// Name of the socket in the data directory.
const SOCKET: &str = "socket";
/// Longest message: the largest state that any NATS server lets through, and its header.
const MAX_MESSAGE_BYTES: usize = (64 << 20) + limits::MESSAGE_OVERHEAD_BYTES;
/// Longest time to be let in.
const CONNECT: Duration = Duration::from_secs(1);
/// After a failure requests go over NATS for this long before the door is tried again.
const CLOSED_FOR: Duration = Duration::from_secs(1);
/// Requests or answers that wait for the socket.
const QUEUE: usize = 64;

/// Where the store with this data directory listens.
fn socket(data_dir: &Path) -> PathBuf {
    data_dir.join(SOCKET)
}

async fn write_message(socket: &mut (impl AsyncWrite + Unpin), number: u64, bytes: &[u8]) -> io::Result<()> {
    let len = u32::try_from(bytes.len()).map_err(io::Error::other)?;
    let mut head = [0; 12];
    head[..8].copy_from_slice(&number.to_le_bytes());
    head[8..].copy_from_slice(&len.to_le_bytes());
    socket.write_all(&head).await?;
    socket.write_all(bytes).await
}

/// Not cancel safe: a message that was begun has to be read to its end.
async fn read_message(socket: &mut (impl AsyncRead + Unpin)) -> io::Result<(u64, Bytes)> {
    let number = socket.read_u64_le().await?;
    let len = socket.read_u32_le().await? as usize;
    if len > MAX_MESSAGE_BYTES {
        return Err(io::Error::other(format!("a message of {len} bytes; at most {MAX_MESSAGE_BYTES}")));
    }
    let mut bytes = BytesMut::with_capacity(len);
    while bytes.len() < len {
        let missing = len - bytes.len();
        if socket.read_buf(&mut (&mut bytes).limit(missing)).await? == 0 {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
    }
    Ok((number, bytes.freeze()))
}

/// Opens the door. The caller owns the data directory, so a socket that is there was left by a dead store.
///
/// # Errors
/// Those of the file system, such as a path that is too long for a socket (108 bytes).
pub(crate) fn listen(data_dir: &Path) -> io::Result<UnixListener> {
    let path = socket(data_dir);
    match std::fs::remove_file(&path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
        _ => {}
    }
    let listener = UnixListener::bind(&path)?;
    // For the store's own user; who may not enter uses NATS, and what that allows is NATS's business.
    std::fs::set_permissions(path, std::fs::Permissions::from_mode(0o600))?;
    Ok(listener)
}

/// Lets invokers in until `shutdown`. Requests under way hold a permit each.
pub(crate) async fn serve(
    listener: UnixListener,
    store: LocalStore,
    permits: Arc<Semaphore>,
    shutdown: CancellationToken,
) {
    loop {
        let accepted = tokio::select! {
            accepted = listener.accept() => accepted,
            () = shutdown.cancelled() => return,
        };
        let stream = match accepted {
            Ok((stream, _)) => stream,
            Err(error) => {
                // Out of file descriptors, say: invokers that find no way in use NATS.
                tracing::warn!(%error, "direct door: accepting failed");
                tokio::time::sleep(CONNECT).await;
                continue;
            }
        };
        let (store, permits, shutdown) = (store.clone(), permits.clone(), shutdown.clone());
        tokio::spawn(async move {
            if let Err(error) = attend(stream, store, permits, shutdown).await {
                tracing::debug!(%error, "direct door: an invoker has gone");
            }
        });
    }
}

/// Answers one invoker.
async fn attend(
    stream: UnixStream,
    store: LocalStore,
    permits: Arc<Semaphore>,
    shutdown: CancellationToken,
) -> io::Result<()> {
    let (mut requests, mut replies) = stream.into_split();
    write_message(&mut replies, 0, &store.id().0).await?;
    let (sender, mut answers) = mpsc::channel::<(u64, Bytes)>(QUEUE);
    let writing = tokio::spawn(async move {
        while let Some((number, reply)) = answers.recv().await {
            write_message(&mut replies, number, &reply).await?;
        }
        io::Result::Ok(())
    });
    let ended = loop {
        let (number, frame) = tokio::select! {
            message = read_message(&mut requests) => match message {
                Ok(message) => message,
                Err(error) => break Err(error),
            },
            () = shutdown.cancelled() => break Ok(()),
        };
        // The semaphore is never closed, so this only waits.
        let Ok(permit) = permits.clone().acquire_owned().await else { break Ok(()) };
        let (store, sender) = (store.clone(), sender.clone());
        tokio::spawn(async move {
            let reply = answer(&store, &frame).await;
            // Without a receiver the invoker has gone; whoever comes next asks again.
            let _ = sender.send((number, reply)).await;
            drop(permit);
        });
    };
    drop(sender);
    writing.await.map_err(io::Error::other)??;
    ended
}

type Pending = Mutex<Option<HashMap<u64, oneshot::Sender<Bytes>>>>;
type Asked = (Bytes, oneshot::Sender<Bytes>);

fn lock(pending: &Pending) -> MutexGuard<'_, Option<HashMap<u64, oneshot::Sender<Bytes>>>> {
    pending.lock().unwrap_or_else(PoisonError::into_inner)
}

/// An invoker's side of the door.
#[derive(Debug)]
pub(crate) struct Door {
    path: PathBuf,
    id: StoreId,
    state: tokio::sync::Mutex<State>,
}

#[derive(Debug)]
enum State {
    Open(mpsc::Sender<Asked>),
    /// Not tried again before.
    Closed(Option<Instant>),
}

impl Door {
    /// The door of the store `id`, if it is on this host.
    pub(crate) fn new(data_dir: &Path, id: StoreId) -> Self {
        Self { path: socket(data_dir), id, state: tokio::sync::Mutex::new(State::Closed(None)) }
    }

    /// Sends a request this way; `None` when the door is closed, and nothing was sent.
    ///
    /// # Errors
    /// [`StoreError::Unavailable`] when it may have been sent and there is no answer.
    pub(crate) async fn ask(&self, frame: &Bytes, timeout: Duration) -> Option<Result<Bytes, StoreError>> {
        let requests = self.open().await?;
        let (sender, answer) = oneshot::channel();
        requests.send((frame.clone(), sender)).await.ok()?;
        Some(match tokio::time::timeout(timeout, answer).await {
            Ok(Ok(reply)) => Ok(reply),
            Ok(Err(_)) => Err(StoreError::Unavailable("the store closed its direct door".to_owned())),
            Err(_) => Err(StoreError::Unavailable("no answer through the direct door in time".to_owned())),
        })
    }

    async fn open(&self) -> Option<mpsc::Sender<Asked>> {
        let mut state = self.state.lock().await;
        match &*state {
            State::Open(requests) if !requests.is_closed() => return Some(requests.clone()),
            State::Closed(Some(until)) if Instant::now() < *until => return None,
            _ => {}
        }
        match tokio::time::timeout(CONNECT, self.connect()).await.unwrap_or_else(|error| Err(error.into())) {
            Ok(requests) => {
                tracing::info!(path = %self.path.display(), "uses the store's direct door");
                *state = State::Open(requests.clone());
                Some(requests)
            }
            Err(error) => {
                tracing::debug!(%error, path = %self.path.display(), "the store has no direct door here");
                *state = State::Closed(Some(Instant::now() + CLOSED_FOR));
                None
            }
        }
    }

    async fn connect(&self) -> io::Result<mpsc::Sender<Asked>> {
        let stream = UnixStream::connect(&self.path).await?;
        let (mut answers, mut requests) = stream.into_split();
        let (_, id) = read_message(&mut answers).await?;
        if id[..] != self.id.0 {
            return Err(io::Error::other("another store listens there"));
        }
        let (sender, mut asked) = mpsc::channel::<Asked>(QUEUE);
        // `None` once nothing can be answered any more.
        let pending: Arc<Pending> = Arc::new(Mutex::new(Some(HashMap::new())));
        let waiting = pending.clone();
        let writing = tokio::spawn(async move {
            let mut number = 0;
            while let Some((frame, answer)) = asked.recv().await {
                number += 1;
                if let Some(waiting) = &mut *lock(&waiting) {
                    waiting.insert(number, answer);
                }
                if write_message(&mut requests, number, &frame).await.is_err() {
                    return;
                }
            }
        });
        tokio::spawn(async move {
            while let Ok((number, reply)) = read_message(&mut answers).await {
                let answer = lock(&pending).as_mut().and_then(|waiting| waiting.remove(&number));
                // Without a receiver whoever asked has given up.
                answer.map(|answer| answer.send(reply));
            }
            writing.abort();
            *lock(&pending) = None;
        });
        Ok(sender)
    }
}
