"""Names of files and folders that operating systems, network disks and tools leave in a dataset, which are ignored."""

from functools import lru_cache


def _names(listed: str) -> tuple[str, ...]:
    return tuple(listed.split(" | "))


# What systems and tools leave in folders: the reason, and names in lower case; `*` at one end stands for anything.
SYSTEM = {
    "left by Windows": _names(
        "thumbs.db | thumbs.db:encryptable | ehthumbs.db | ehthumbs_vista.db | desktop.ini | $recycle.bin | "
        "system volume information | recycler | autorun.inf | pagefile.sys | hiberfil.sys | swapfile.sys | "
        "found.0* | config.msi | *.lnk | indexervolumeguid | wpsettings.dat | ~$* | *:zone.identifier | *.zone.identifier | "
        "*:smartscreen"
    ),
    "left by macOS": _names(
        "__macosx | .ds_store | ._* | .trashes | .spotlight-v100 | .fseventsd | .temporaryitems | icon\r | "
        ".documentrevisions-v100 | .appledouble | .appledb | .appledesktop | .lsoverride | .volumeicon.icns | "
        ".apdisk | network trash folder | temporary items | thevolumesettingsfolder | thefindbycontentfolder"
    ),
    "left by a network disk": _names(
        "@eadir | #recycle | #snapshot | @recycle | @recently-snapshot | .@__thumb | @tmp | @sharebin | "
        "@synoeastream | *@synoeastream | *@synoresource | @synoresource | @transcode | .@__qini | ~snapshot | "
        ".snapshot | .snapshots"
    ),
    "left by Linux": _names("lost+found | .trash | .trash-* | .fuse_hidden* | .nfs* | .directory | .thumbnails"),
    "left by a tool": _names(
        ".ipynb_checkpoints | __pycache__ | .git | .gitignore | .gitattributes | .gitkeep | .dvc | .dvcignore | "
        ".cache | .svn | .hg | .idea | .vscode | .picasa.ini | picasa.ini | .picasaoriginals | "
        "zbthumbnail.info | *.swp | *~ | *.thm | *.jbf | bridgesort | album.dat | *.ffs_db | *.tmp | cachedir.tag"
    ),
    "an unfinished download": _names(
        "*.crdownload | *.part | *.partial | *.opdownload | *.aria2 | *.filepart | *.download"
    ),
}
NAMED = {name: why for why, names in SYSTEM.items() for name in names if "*" not in name}
STARTS = {name[:-1]: why for why, names in SYSTEM.items() for name in names if name.endswith("*")}
ENDS = {name[1:]: why for why, names in SYSTEM.items() for name in names if name.startswith("*")}
HIDDEN = "hidden: the name begins with a dot"


@lru_cache(4096)  # folders come again with each of their files
def system_reason(name: str) -> str | None:
    """Returns the reason to ignore a file or folder of this name; None if it may belong to a dataset."""
    lower = name.lower()
    if why := NAMED.get(lower):
        return why
    if lower.endswith(tuple(ENDS)):
        return next(why for end, why in ENDS.items() if lower.endswith(end))
    if lower.startswith(tuple(STARTS)):
        return next(why for start, why in STARTS.items() if lower.startswith(start))
    return HIDDEN if name.startswith(".") else None


def left_by_systems(name: str) -> tuple[str, str] | None:
    """Returns the reason to ignore a file, and its name or that of the ignored folder it lies in: a folder counts once."""
    parts = name.split("/")
    for place, part in enumerate(parts):
        if why := system_reason(part):
            return why, "/".join(parts[: place + 1]) + ("/" if place + 1 < len(parts) else "")
    return None
