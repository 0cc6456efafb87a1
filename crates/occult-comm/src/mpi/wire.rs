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
    request: ffi::MPI_Request,
    keep: Option<Outgoing>,
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
        Ok(Self { request, keep: Some(bytes) })
    }

    /// Whether the bytes are free again.
    pub(super) fn test(&mut self) -> WireResult<bool> {
        if self.keep.is_some() && test(&mut self.request)?.is_some() {
            self.keep = None;
        }
        Ok(self.keep.is_none())
    }
}

impl Drop for Sending {
    fn drop(&mut self) {
        std::mem::forget(self.keep.take());
    }
}

/// A buffer being filled by one or more messages. Dropped before it is done, it leaks the buffer: MPI may still write.
#[derive(Debug)]
pub(super) struct Receiving {
    requests: Vec<ffi::MPI_Request>,
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
            receiving.requests.push(request);
        }
        Ok(receiving)
    }

    /// The buffer when it is filled, with the sender and the length of the last message.
    pub(super) fn test(&mut self) -> WireResult<Option<(Buffer, usize, usize)>> {
        let mut last = (0, 0);
        while let Some(request) = self.requests.first_mut() {
            match test(request)? {
                Some(done) => last = done,
                None => return Ok(None),
            }
            self.requests.remove(0);
        }
        Ok(self.buffer.take().map(|buffer| (buffer, last.0, last.1)))
    }

    /// Asks MPI to give up; `test` tells when it has.
    pub(super) fn cancel(&mut self) -> WireResult<()> {
        // SAFETY: requests in the list are active.
        self.requests.iter_mut().try_for_each(|request| check(unsafe { ffi::MPI_Cancel(request) }))
    }
}

impl Drop for Receiving {
    fn drop(&mut self) {
        std::mem::forget(self.buffer.take());
    }
}

/// Sender and length of what came, when the request is done.
fn test(request: &mut ffi::MPI_Request) -> WireResult<Option<(usize, usize)>> {
    let mut flag: c_int = 0;
    // SAFETY: a status is a plain C struct of numbers, for which all zeros is a value.
    let mut status: ffi::MPI_Status = unsafe { std::mem::zeroed() };
    // SAFETY: the request belongs to this rank and is active; the pointers are those of locals.
    check(unsafe { ffi::MPI_Test(request, &raw mut flag, &raw mut status) })?;
    if flag == 0 {
        return Ok(None);
    }
    let mut count: c_int = 0;
    // SAFETY: MPI has filled the status.
    check(unsafe { ffi::MPI_Get_count(&raw const status, ffi::RSMPI_UINT8_T, &raw mut count) })?;
    // A send has no source; nobody asks for it.
    Ok(Some((usize::try_from(status.MPI_SOURCE).unwrap_or(0), usize::try_from(count).unwrap_or(0))))
}

fn int(value: usize) -> WireResult<c_int> {
    c_int::try_from(value).map_err(|_| format!("{value} is too large for MPI"))
}
