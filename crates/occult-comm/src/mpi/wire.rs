//! The MPI calls themselves: immediate sends and receives of bytes, tested, never waited for.
//!
//! Callers keep one lock around everything in here: `MPI_THREAD_SERIALIZED` is what is asked of MPI.

use std::ffi::{c_char, c_int};
use std::ops::Range;
use std::sync::Arc;

use mpi::ffi;

use crate::Buffer;

/// A call's failure in MPI's words.
pub(super) type WireResult<T> = Result<T, String>;

fn check(code: c_int) -> WireResult<()> {
    // MPI_SUCCESS is 0 by the standard.
    if code == 0 {
        return Ok(());
    }
    // SAFETY: a constant of the library.
    let mut text = vec![0u8; usize::try_from(unsafe { ffi::RSMPI_MAX_PROCESSOR_NAME }).unwrap_or(0) + 1024];
    let mut len: c_int = 0;
    // SAFETY: `text` has at least MPI_MAX_ERROR_STRING bytes (256 in Open MPI, 512 or 1,024 in MPICH).
    unsafe { ffi::MPI_Error_string(code, text.as_mut_ptr().cast::<c_char>(), &raw mut len) };
    text.truncate(usize::try_from(len).unwrap_or(0));
    Err(String::from_utf8_lossy(&text).into_owned())
}

/// Makes errors of the world's communicator come back as codes instead of ending the process.
pub(super) fn return_errors() -> WireResult<()> {
    // SAFETY: MPI is initialised; both are constants of the library.
    check(unsafe { ffi::MPI_Comm_set_errhandler(ffi::RSMPI_COMM_WORLD, ffi::RSMPI_ERRORS_RETURN) })
}

/// Ends all processes of the MPI program.
pub(super) fn abort_world(code: i32) {
    // SAFETY: MPI is initialised and not finalised while the process still wants to leave through it.
    unsafe { ffi::MPI_Abort(ffi::RSMPI_COMM_WORLD, code) };
}

/// Bytes that stay where they are while MPI reads them.
#[derive(Debug)]
pub(super) enum Outgoing {
    Own(Box<[u8]>),
    Part(Arc<Buffer>, Range<usize>),
}

impl Outgoing {
    fn as_bytes(&self) -> &[u8] {
        match self {
            Self::Own(bytes) => bytes,
            Self::Part(buffer, range) => &buffer.as_bytes()[range.clone()],
        }
    }
}

/// A send under way. Dropped before it is done, it leaks its bytes: MPI may still read them.
#[derive(Debug)]
pub(super) struct Sending {
    request: Request,
    /// Freed when the request is done.
    keep: Outgoing,
}

impl Sending {
    pub(super) fn start(bytes: Outgoing, to: usize, tag: u32) -> WireResult<Self> {
        let view = bytes.as_bytes();
        let (count, to, tag) = (int(view.len())?, int(to)?, int(tag as usize)?);
        // SAFETY: a null handle is a value of the type.
        let mut request = unsafe { ffi::RSMPI_REQUEST_NULL };
        // SAFETY: `view` stays in place and unchanged until the request is done: boxed or shared memory, kept below and
        // leaked on an early drop.
        check(unsafe {
            ffi::MPI_Isend(
                view.as_ptr().cast(),
                count,
                ffi::RSMPI_UINT8_T,
                to,
                tag,
                ffi::RSMPI_COMM_WORLD,
                &raw mut request,
            )
        })?;
        Ok(Self { request: Request::new(request), keep: bytes })
    }

    pub(super) fn request(&mut self) -> &mut Request {
        &mut self.request
    }

    /// Whether the bytes are free again.
    pub(super) fn is_done(&self) -> bool {
        self.request.done.is_some()
    }
}

impl Drop for Sending {
    fn drop(&mut self) {
        if !self.is_done() {
            std::mem::forget(std::mem::replace(&mut self.keep, Outgoing::Own(Box::default())));
        }
    }
}

/// A buffer being filled by one or more messages. Dropped before it is done, it leaks the buffer: MPI may still write.
#[derive(Debug)]
pub(super) struct Receiving {
    requests: Vec<Request>,
    buffer: Option<Buffer>,
}

impl Receiving {
    /// Receives into `buffer` messages of `piece_bytes` (the last one shorter) from `from` (anybody when `None`) under
    /// the given tags.
    pub(super) fn start(
        mut buffer: Buffer,
        piece_bytes: usize,
        from: Option<usize>,
        tags: impl Iterator<Item = u32>,
    ) -> WireResult<Self> {
        // SAFETY: a constant of the library.
        let from = from.map_or(Ok(unsafe { ffi::RSMPI_ANY_SOURCE }), int)?;
        let (start, len) = (buffer.as_bytes_mut().as_mut_ptr(), buffer.len_bytes());
        let mut receiving = Self { requests: Vec::new(), buffer: Some(buffer) };
        for (at, tag) in (0..len).step_by(piece_bytes).zip(tags) {
            let (count, tag) = (int(piece_bytes.min(len - at))?, int(tag as usize)?);
            // SAFETY: a null handle is a value of the type.
            let mut request = unsafe { ffi::RSMPI_REQUEST_NULL };
            // SAFETY: `at + count` lies within the buffer, whose heap memory stays in place and is not looked at until
            // all requests are done; leaked on an early drop.
            check(unsafe {
                ffi::MPI_Irecv(
                    start.add(at).cast(),
                    count,
                    ffi::RSMPI_UINT8_T,
                    from,
                    tag,
                    ffi::RSMPI_COMM_WORLD,
                    &raw mut request,
                )
            })?;
            receiving.requests.push(Request::new(request));
        }
        Ok(receiving)
    }

    pub(super) fn requests(&mut self) -> &mut [Request] {
        &mut self.requests
    }

    /// The buffer when it is filled, with the sender and the length of the last message.
    pub(super) fn take(&mut self) -> Option<(Buffer, usize, usize)> {
        let mut last = (0, 0);
        for request in &self.requests {
            last = request.done?;
        }
        self.buffer.take().map(|buffer| (buffer, last.0, last.1))
    }

    /// Asks MPI to give up; `test` tells when it has.
    pub(super) fn cancel(&mut self) -> WireResult<()> {
        let mut active = self.requests.iter_mut().filter(|request| request.done.is_none());
        // SAFETY: a request that is not done is active.
        active.try_for_each(|request| check(unsafe { ffi::MPI_Cancel(&raw mut request.handle) }))
    }
}

impl Drop for Receiving {
    fn drop(&mut self) {
        std::mem::forget(self.buffer.take());
    }
}

/// A message under way.
#[derive(Debug)]
pub(super) struct Request {
    handle: ffi::MPI_Request,
    /// Sender and length of what came (of a send nobody asks for them). The handle is active until then.
    done: Option<(usize, usize)>,
}

impl Request {
    fn new(handle: ffi::MPI_Request) -> Self {
        Self { handle, done: None }
    }
}

/// Tests messages, all in one call: a test moves data and looks at every connection, so one for each message would cost as
/// many looks. Returns how many were finished.
pub(super) fn test_some<'a>(requests: impl Iterator<Item = &'a mut Request>) -> WireResult<usize> {
    let mut active: Vec<&mut Request> = requests.filter(|request| request.done.is_none()).collect();
    let mut handles: Vec<ffi::MPI_Request> = active.iter().map(|request| request.handle).collect();
    let mut indices: Vec<c_int> = vec![0; handles.len()];
    // SAFETY: a status is a plain C struct of numbers, for which all zeros is a value.
    let mut statuses: Vec<ffi::MPI_Status> = vec![unsafe { std::mem::zeroed() }; handles.len()];
    let mut count: c_int = 0;
    // SAFETY: the handles are active requests of this rank; the three arrays have room for all of them.
    let code = unsafe {
        ffi::MPI_Testsome(
            int(handles.len())?,
            handles.as_mut_ptr(),
            &raw mut count,
            indices.as_mut_ptr(),
            statuses.as_mut_ptr(),
        )
    };
    check(code)?;
    // MPI_UNDEFINED, when there was nothing to test, is negative.
    let count = usize::try_from(count).unwrap_or(0);
    for (&index, status) in indices.iter().zip(&statuses).take(count) {
        let mut len: c_int = 0;
        // SAFETY: MPI has filled the status.
        check(unsafe { ffi::MPI_Get_count(&raw const *status, ffi::RSMPI_UINT8_T, &raw mut len) })?;
        let done = (usize::try_from(status.MPI_SOURCE).unwrap_or(0), usize::try_from(len).unwrap_or(0));
        if let Some(request) = usize::try_from(index).ok().and_then(|index| active.get_mut(index)) {
            request.done = Some(done);
        }
    }
    Ok(count)
}

fn int(value: usize) -> WireResult<c_int> {
    c_int::try_from(value).map_err(|_| format!("{value} is too large for MPI"))
}
