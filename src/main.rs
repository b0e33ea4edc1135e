//! The `forebay` program: the command line of the library, with the built-in filters.
//!
//! A program with filters of its own is the same line with `.filter::<T>()` behind `builder()`.

use std::alloc::{GlobalAlloc, Layout};
use std::ffi::c_void;
use std::process::ExitCode;

use mimalloc::MiMalloc;

unsafe extern "C" {
    fn mi_malloc(size: usize) -> *mut c_void;
    fn mi_zalloc(size: usize) -> *mut c_void;
    fn mi_realloc(memory: *mut c_void, size: usize) -> *mut c_void;
    fn mi_free(memory: *mut c_void);
    fn mi_usable_size(memory: *const c_void) -> usize;
}

/// mimalloc. Measured with `make bench`, CPU per small request to nginx's: with the system's allocator 2.3, with
/// jemalloc 2.2, with mimalloc 1.7.
///
/// Its crate names the alignment with every request. mimalloc then looks for memory that is aligned so, which takes
/// three times the instructions of a request without one. All of its memory is aligned to 8 bytes, and hardly anything
/// needs more.
struct Allocator;

#[global_allocator]
static ALLOCATOR: Allocator = Allocator;

impl Allocator {
    fn is_aligned_anyway(layout: Layout) -> bool {
        layout.align() <= 8
    }
}

// SAFETY: each function is mimalloc's own of the same meaning. What was allocated with an alignment and without one is
// freed and resized alike.
unsafe impl GlobalAlloc for Allocator {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        // SAFETY: it takes any size, and is null where there is no memory.
        if Self::is_aligned_anyway(layout) {
            unsafe { mi_malloc(layout.size()).cast() }
        }
        // SAFETY: as the caller promises.
        else {
            unsafe { MiMalloc.alloc(layout) }
        }
    }

    unsafe fn alloc_zeroed(&self, layout: Layout) -> *mut u8 {
        // SAFETY: as above.
        if Self::is_aligned_anyway(layout) {
            unsafe { mi_zalloc(layout.size()).cast() }
        }
        // SAFETY: as the caller promises.
        else {
            unsafe { MiMalloc.alloc_zeroed(layout) }
        }
    }

    unsafe fn realloc(&self, memory: *mut u8, layout: Layout, size: usize) -> *mut u8 {
        // SAFETY: the memory is mimalloc's, as the caller promises.
        if Self::is_aligned_anyway(layout) {
            unsafe { mi_realloc(memory.cast(), size).cast() }
        }
        // SAFETY: as the caller promises.
        else {
            unsafe { MiMalloc.realloc(memory, layout, size) }
        }
    }

    unsafe fn dealloc(&self, memory: *mut u8, _: Layout) {
        // SAFETY: the memory is mimalloc's, as the caller promises.
        unsafe { mi_free(memory.cast()) }
    }
}

/// So much of the heap may be in huge pages: what small requests need over and over is at its beginning.
const HUGE_BYTES: usize = 32 << 20;

/// BoringSSL asks for its memory here, so that it comes from the same allocator. What a handshake needs and gives back
/// lies between what a connection keeps, and the system's allocator let little of that go: 2.8 KiB for each parked
/// connection. BoringSSL finds these functions by their names when it is linked.
mod boringssl {
    use pingora::tls::ssl_sys::OPENSSL_cleanse;

    use super::{c_void, mi_free, mi_malloc, mi_usable_size};

    #[unsafe(no_mangle)]
    extern "C" fn OPENSSL_memory_alloc(size: usize) -> *mut c_void {
        // SAFETY: it takes any size, and is null where there is no memory.
        unsafe { mi_malloc(size) }
    }

    /// Overwrites it first, for it may have held a key.
    #[unsafe(no_mangle)]
    unsafe extern "C" fn OPENSSL_memory_free(memory: *mut c_void) {
        // SAFETY: BoringSSL gives back what it got above, which is never null here and as large as is said.
        unsafe {
            OPENSSL_cleanse(memory, mi_usable_size(memory));
            mi_free(memory);
        }
    }

    #[unsafe(no_mangle)]
    unsafe extern "C" fn OPENSSL_memory_get_size(memory: *mut c_void) -> usize {
        // SAFETY: it is what BoringSSL got above.
        unsafe { mi_usable_size(memory) }
    }
}

fn main() -> ExitCode {
    bound_huge_pages();
    forebay::cli::main(forebay::gateway::Gateway::builder(), std::env::args_os())
}

/// mimalloc asks for huge pages for all of its heap. Where a crowd of slow clients makes that grow, the kernel clears 2
/// MiB at a time in the middle of a request, which takes milliseconds, and makes present 2 MiB where 64 KiB are needed.
/// So only the beginning of the heap keeps them.
fn bound_huge_pages() {
    let probe = Box::new(0_u8);
    let Some((begin, end)) = mapping_around(std::ptr::from_ref(&*probe).addr()) else { return };
    let bound = (begin + HUGE_BYTES).next_multiple_of(2 << 20);
    if bound < end {
        let rest = std::ptr::with_exposed_provenance_mut(bound);
        // SAFETY: the range is mapped, and the advice changes nothing that it holds. If it is not taken nothing is
        // lost.
        unsafe { libc::madvise(rest, end - bound, libc::MADV_NOHUGEPAGE) };
    }
}

/// The part of the address space that this address was mapped with.
fn mapping_around(address: usize) -> Option<(usize, usize)> {
    let maps = std::fs::read_to_string("/proc/self/maps").ok()?;
    let ranges = maps.lines().filter_map(|line| {
        let (begin, end) = line.split_once(' ')?.0.split_once('-')?;
        Some((usize::from_str_radix(begin, 16).ok()?, usize::from_str_radix(end, 16).ok()?))
    });
    ranges.into_iter().find(|(begin, end)| (*begin..*end).contains(&address))
}
